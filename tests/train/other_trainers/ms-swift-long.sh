#!/bin/bash
# 8 GPUs, Ulysses
MODEL=Qwen/Qwen2.5-7B-Instruct
export CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7

NPROC_PER_NODE=8 \
swift sft \
    --model $MODEL \
    --tuner_type lora \
    --lora_rank 16 \
    --target_modules all-linear \
    --dataset 'AI-ModelScope/LongAlpaca-12k' 'mine.jsonl#500' \
    --load_from_cache_file true \
    --torch_dtype bfloat16 \
    --max_length 65536 \
    --truncation_strategy right \
    --rope_scaling '{"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32768}' \
    --sequence_parallel_size 4 \
    --packing true \
    --attn_impl flash_attn \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 8 \
    --num_train_epochs 1 \
    --warmup_ratio 0.05 \
    --loss_scale last_round \
    --deepspeed zero3 \
    --save_steps 50 \
    --save_total_limit 2 \
    --split_dataset_ratio 0.01 \
    --output_dir output

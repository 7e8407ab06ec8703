"""The options of a model that commands ask, and of how it is asked.

@from_settings(settings=..., model=MODEL, prompts=PROMPTS)
def command(settings: NeedleConfig, model: AnswererConfig, prompts: PromptConfig, ...) -> None:
    ...
"""

from longspan.cli.from_settings import Part

MODEL = Part("longspan.infer.config:AnswererConfig", lifted=["server.base_url"])
PROMPTS = Part("longspan.eval.prompts:PromptConfig")

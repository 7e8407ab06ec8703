"""One sequence over many devices: layouts, schedules that carry keys and values, the mesh, and their proof."""

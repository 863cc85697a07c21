"""Custom nodes for ComfyUI that sample with the solvers of diffusers_gas. See README.md beside this file."""

try:
    from .nodes import comfy_entrypoint
except ImportError:  # a ComfyUI from before `comfy_api.latest`
    from .older_nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
else:
    __all__ = ["comfy_entrypoint"]

"""The node for versions of ComfyUI without `comfy_api.latest`."""

from .loading import CATEGORY, INPUTS, NAME, fingerprint, load


class LoadGASSolver:
    """A solver's SAMPLER and SIGMAS for a MODEL."""

    RETURN_TYPES = ("SAMPLER", "SIGMAS")
    FUNCTION = "execute"
    CATEGORY = CATEGORY
    DESCRIPTION = load.__doc__

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 (ComfyUI's name)
        types = {"solver": "STRING", "steps": "INT", "denoise": "FLOAT"}
        required = {"model": ("MODEL",), **{name: (types[name], INPUTS[name]) for name in types}}
        return {"required": required, "optional": {"guidance_scale": ("FLOAT", INPUTS["guidance_scale"])}}

    @classmethod
    def IS_CHANGED(cls, solver, **others):  # noqa: N802 (ComfyUI's name)
        return fingerprint(solver)

    def execute(self, model, solver, steps, denoise, guidance_scale=0.0):
        return load(model, solver, steps, denoise, guidance_scale)


NODE_CLASS_MAPPINGS = {"LoadGASSolver": LoadGASSolver}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadGASSolver": NAME}

"""The node for ComfyUI's present interface, `comfy_api.latest`."""

from comfy_api.latest import ComfyExtension, io

from .loading import CATEGORY, INPUTS, NAME, fingerprint, load


class LoadGASSolver(io.ComfyNode):
    """A solver's SAMPLER and SIGMAS for a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        solver, steps, denoise, guidance_scale = INPUTS.values()
        return io.Schema(
            node_id="LoadGASSolver",
            display_name=NAME,
            category=CATEGORY,
            description=load.__doc__,
            inputs=[
                io.Model.Input("model"),
                io.String.Input("solver", **solver),
                io.Int.Input("steps", **steps),
                io.Float.Input("denoise", **denoise),
                io.Float.Input("guidance_scale", optional=True, **guidance_scale),
            ],
            outputs=[io.Sampler.Output(), io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, model, solver, steps, denoise, guidance_scale=0.0) -> io.NodeOutput:
        return io.NodeOutput(*load(model, solver, steps, denoise, guidance_scale))

    @classmethod
    def fingerprint_inputs(cls, solver, **others):
        return fingerprint(solver)


class SolverExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadGASSolver]


async def comfy_entrypoint() -> SolverExtension:
    return SolverExtension()

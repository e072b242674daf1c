"""The command `explore`: a run's results in the browser, or as a Space."""

from hf_forward_inf.commands.options import ExploreOptions
from hf_forward_inf.explorer import candidates_of, explorer, export_space
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.utils.processes import say


def explore_run(options: ExploreOptions) -> dict[str, str]:
    """Serve the explorer until it is interrupted, or write a Space.

    Raises:
        FileExistsError: If the folder of the Space holds something.
        FileNotFoundError: If the folder holds no result.
        ValueError: If a model is given, and it is not known what to trace over.
    """
    if options.export_space is not None:
        export_space(options.folder, options.export_space)
        say(f"Written: {options.export_space}. Upload it: hf upload NAME {options.export_space} --repo-type space")
        return {"space": options.export_space}
    tracer, candidates = None, options.candidates or candidates_of(options.folder)
    if options.model is not None:
        if candidates is None:
            raise ValueError("--model traces what you type over its training examples: give --candidates with it.")
        tracer = ForwardInf.from_pretrained(options.model)
    app = explorer(options.folder, tracer, candidates)
    app.launch(server_port=options.port, quiet=False)
    return {}

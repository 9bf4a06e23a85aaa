"""From a recipe to a merged model on disk: find, open, plan, write.

plan = plan_merge(recipe, text, Library(folder), Options())
write_merge(plan, Path("merged"))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ensemerge.errors import InvalidSpec
from ensemerge.merge.alignment_spec import Alignment
from ensemerge.merge.companions import Facts, write_companions
from ensemerge.merge.engine import Journal, Machine, merge_weights
from ensemerge.merge.forms import Form, SafetensorsForm
from ensemerge.merge.layout import Layout, expand
from ensemerge.merge.methods.mergekit import DEVIATIONS, MERGEKIT
from ensemerge.merge.methods.table import METHODS, MethodEntry
from ensemerge.merge.naming import layer_counts
from ensemerge.merge.opened import Library, OpenModel, cast_on_load, open_models, with_vocabulary
from ensemerge.merge.plan import MergePlan, Output, fingerprint, fit, make_outputs, shared_surveys, with_tied
from ensemerge.merge.recipe import Recipe
from ensemerge.merge.staging import staged
from ensemerge.merge.vocabulary import VocabularyPlan, tokenizers_agree
from ensemerge.progress import Notify, silent
from ensemerge.weights.writer import TensorWriter

if TYPE_CHECKING:
    from ensemerge.merge.onnx_forms import PairedModels

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Options:
    """How a merge runs, beside what its recipe says."""

    machine: Machine = field(default_factory=Machine)
    memory_bytes: int | None = None
    shard_bytes: int = SHARD_BYTES
    graph: Path | None = None  # an ONNX export that gets the merged weights


@dataclass(frozen=True)
class Merge:
    """A merge that is ready to run: the plan, the form of its output, and what goes beside the weights."""

    plan: MergePlan
    form: Form
    fingerprint: str
    beside: Callable[[Path, str], Sequence[str]]  # writes what goes beside a task's weights, returns remarks


def plan_merge(recipe: Recipe, text: str, library: Library, options: Options) -> Merge:
    """Settle everything from headers. Raises InvalidSpec, InvalidModel, InvalidData, StructureMismatch."""
    models = open_models(recipe, library)
    form, paired, proved = _form(recipe, models, library, options)
    models, vocabulary = with_vocabulary(recipe, paired, library)
    if recipe.compat:
        models = cast_on_load(models, recipe.dtype)
    layout, outputs = lay_out(recipe, models)
    if isinstance(form, SafetensorsForm) and models[str(recipe.donor)].config is None:
        outputs = tuple(with_tied(output, layout.ties) for output in outputs)
    if options.graph is not None:
        form, outputs = _into_graph(options.graph, models, outputs)
    extra = sum(form.extra_bytes(output) for output in outputs)
    readers = [model.reader for model in models.values()]
    machine, memory = fit(outputs, readers, options.machine, options.memory_bytes, extra)
    notes = (*proved, *_notes(recipe, layout, outputs, models, vocabulary))
    plan = MergePlan(recipe.method, outputs, machine, memory, notes)
    beside = _companions(recipe, text, models, library, outputs, layout, vocabulary)
    settings = (type(form).__name__, options.shard_bytes, options.machine.device.type)
    return Merge(plan, form, fingerprint(recipe, outputs, _files(models, options), *settings), beside)


@dataclass(frozen=True)
class Written:
    """A merge that is done: what a person should look at, and how many tensors an earlier try had written."""

    remarks: Sequence[str]
    resumed: int


def write_merge(merge: Merge, out: Path, notify: Notify = silent) -> Written:
    """Run the merge and put the model, or the models of all tasks, at `out`.

    Raises InvalidData where `out` exists or the disk is full, InvalidModel for weights that cannot be merged.
    """
    remarks: list[str] = []
    with staged(out, merge.fingerprint) as staging:
        for output in merge.plan.outputs:
            folder = staging.folder / output.folder
            folder.mkdir(exist_ok=True)
            _write_output(merge, output, folder, staging.under(output.folder), notify)
            remarks += merge.beside(folder, output.folder)
    return Written(list(dict.fromkeys(remarks)), staging.resumed)


def _files(models: Mapping[str, OpenModel], options: Options) -> Iterator[Path]:
    """Every file that decides what the merge becomes."""
    for model in models.values():
        yield from model.reader.files
        yield from (file for file in model.folder.glob("*.json") if file.is_file())
    if options.graph is not None:
        yield options.graph


def lay_out(recipe: Recipe, models: Mapping[str, OpenModel]) -> tuple[Layout, tuple[Output, ...]]:
    """The tensors of the merged model, and the work that makes them. Raises InvalidSpec, a line for each problem."""
    methods = methods_of(recipe)
    layout = expand(recipe, {name: model.names for name, model in models.items()}, methods)
    readers = {name: model.reader for name, model in models.items()}
    return layout, make_outputs(recipe, layout.tensors, readers, methods)


def methods_of(recipe: Recipe) -> Mapping[str, MethodEntry]:
    """The table of methods that a recipe asks for. Raises InvalidSpec for one that mergekit does not have."""
    if recipe.compat is None:
        return METHODS
    if recipe.method not in MERGEKIT:
        raise InvalidSpec(f"mergekit has no method '{recipe.method}'; leave out `compat: mergekit`")
    return MERGEKIT


def _form(
    recipe: Recipe, models: Mapping[str, OpenModel], library: Library, options: Options
) -> tuple[Form, Mapping[str, OpenModel], Sequence[str]]:
    """The form of the output, the models as they are merged, and what was proved of them."""
    if any(model.onnx is not None for model in models.values()):
        # Half a second of imports that a merge of safetensors need not spend.
        from ensemerge.merge.onnx_forms import pair_models

        paired = pair_models(recipe, models)
        if recipe.alignment is None:
            return paired.form, paired.models, ()
        return paired.form, *_aligned(paired, recipe.alignment, recipe, library)
    for key in ("calibration", "alignment"):
        if getattr(recipe, key) is not None:
            raise InvalidSpec(f"{key} needs a graph; merge ONNX models, with `ensemerge build` as `kind: merge`")
    return SafetensorsForm(options.shard_bytes), models, ()


def _aligned(
    paired: PairedModels, alignment: Alignment, recipe: Recipe, library: Library
) -> tuple[Mapping[str, OpenModel], Sequence[str]]:
    from ensemerge.graph.feeds import read_arrays
    from ensemerge.merge.alignment import align_models

    feeds = None if recipe.calibration is None else read_arrays(library.folder / recipe.calibration.data)
    aligned = align_models(paired, alignment, feeds)
    proved = [f"{check.name}: {check.detail} is {check.difference:.1e}" for check in aligned.checks]
    return aligned.models, proved


def _into_graph(
    graph: Path, models: Mapping[str, OpenModel], outputs: Sequence[Output]
) -> tuple[Form, tuple[Output, ...]]:
    from ensemerge.merge.onnx_forms import into_graph

    return into_graph(graph, models, outputs)


def _notes(
    recipe: Recipe,
    layout: Layout,
    outputs: Sequence[Output],
    models: Mapping[str, OpenModel],
    vocabulary: VocabularyPlan | None,
) -> tuple[str, ...]:
    notes = list(layout.notes)
    if (groups := shared_surveys(outputs[:1])) > 1:
        notes.append(f"parameters differ between tensors: {groups} groups are looked at apart, not the model as one")
    if recipe.compat is None and recipe.method in DEVIATIONS:
        notes.append(f"unlike mergekit: {DEVIATIONS[recipe.method]} (`compat: mergekit` gives its numbers)")
    if vocabulary is not None:
        notes += vocabulary.notes
    elif len(models) > 1:
        notes += tokenizers_agree({name: model.vocabulary for name, model in models.items()})
    return tuple(notes)


def _companions(
    recipe: Recipe,
    text: str,
    models: Mapping[str, OpenModel],
    library: Library,
    outputs: Sequence[Output],
    layout: Layout,
    vocabulary: VocabularyPlan | None,
) -> Callable[[Path, str], Sequence[str]]:
    donor = models[str(recipe.donor)]
    counts = layer_counts(donor.reader.names)
    dtypes = {job.info.dtype for job in outputs[0].jobs if job.info.dtype.is_floating_point}
    dtype = str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else recipe.out_dtype or recipe.dtype
    facts = Facts(dtype, vocabulary, layout.layers, counts, layout.untied)
    folders = {name: model.folder for name, model in models.items()}
    adapters = {str(ref.lora): library.path(ref.lora) for ref in recipe.references() if ref.lora is not None}

    def write(folder: Path, task: str) -> Sequence[str]:
        return write_companions(folder, recipe, text, donor.folder, folders, facts, task=task, adapters=adapters)

    return write


def _write_output(merge: Merge, output: Output, folder: Path, journal: Journal, notify: Notify) -> None:
    writer = merge.form.open(folder, output)
    try:
        merge_weights(output.jobs, writer, merge.plan.machine, _Resumed(journal, writer), notify)
        writer.close()
    finally:
        writer.abandon()


@dataclass(frozen=True)
class _Resumed:
    """A journal whose tensors the writer still has; those that it had in memory alone are merged again."""

    journal: Journal
    writer: TensorWriter

    def holds(self, name: str) -> bool:
        return self.journal.holds(name) and self.writer.keep(name)

    def add(self, name: str) -> None:
        self.journal.add(name)

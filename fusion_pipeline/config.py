"""The YAML schema: loads, checks with errors that name file, field and fix, prints resolved."""

import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from experts import SHIPPED, load_expert
from experts.base import ExpertConfig
from experts.parquet import ParquetObjects
from fusion_pipeline.config_model import ConfigModel
from fusion_pipeline.dataset.evidence import MERGED, EvidenceKind
from fusion_pipeline.dataset.images import MAX_PIXELS
from fusion_pipeline.errors import FusionError
from fusion_pipeline.fuse.composer import ComposerConfig
from fusion_pipeline.fuse.engines import EngineChoice
from fusion_pipeline.perceive.alt_text import AltTextConfig
from fusion_pipeline.perceive.merge import MergeConfig
from fusion_pipeline.perceive.relevance import MODELS
from fusion_pipeline.perceive.tiles import TilesConfig
from fusion_pipeline.prompts.hints import HintConfig
from fusion_pipeline.prompts.render import check_template, template_name, template_names
from fusion_pipeline.select.copies import CopyRule


class ConfigError(FusionError):
    """A configuration that can't be used."""


class SourceConfig(ConfigModel):
    """Where image-text pairs come from: exactly one of `webdataset` and `folder`."""

    webdataset: str | None = None
    """Folder of WebDataset tars: `key.jpg`, `key.txt`, `key.json`."""
    folder: str | None = None
    """Folder of images; the text of `a.jpg` in `a.txt` or `a.json`."""
    shard_size: int = Field(500, ge=1, le=1000)
    """Samples a shard."""
    max_shard_mb: int = Field(256, ge=1, le=256)
    """2**20 bytes of images a shard."""
    max_image_mb: int = Field(64, ge=1)
    """2**20 bytes above which an image is refused."""
    max_pixels: int = Field(MAX_PIXELS, ge=1, le=MAX_PIXELS)
    """Width x height above which an image is refused undecoded."""

    @model_validator(mode="after")
    def _one_place(self) -> "SourceConfig":
        if (self.webdataset is None) == (self.folder is None):
            raise ValueError("set exactly one of source.webdataset and source.folder")
        return self


class FilterConfig(ConfigModel):
    min_short_edge: int = Field(448, ge=1)
    """Pixels; the paper's 448."""


class CopiesConfig(ConfigModel):
    """Near-exact copies: the embedding proposes pairs, an aligned pixel check confirms them."""

    propose: float = Field(0.75, ge=-1, le=1)
    """Cosine similarity from which a pair is looked at. Low: the pixel check decides."""
    probes: int = Field(8, ge=1)
    """A pair is looked at when each one's cluster is among the other's so many nearest."""
    rule: CopyRule = CopyRule()
    """Limits of the pixel check (docs/selection.md)."""


class DuplicatesConfig(ConfigModel):
    """Semantic duplicates: embeddings alone decide."""

    rule: Literal["greedy", "semdedup", "off"] = "greedy"
    """`greedy`: dropped only by a row that is kept. `semdedup`: the released rule."""
    threshold: float = Field(0.97, ge=-1, le=1)
    """Cosine similarity above which a row is dropped (1 - epsilon). Depends on the encoder."""

    @field_validator("rule", mode="before")
    @classmethod
    def _off_is_no_boolean(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads a bare `off` as false


class SelectConfig(ConfigModel):
    clusters: int = Field(50_000, ge=1)
    """Of k-means; the paper's 50,000."""
    iterations: int = Field(100, ge=1)
    """Of k-means."""
    seed: int = 0
    """Of the sample that k-means is fitted on, and of its start."""
    threads: int = Field(1, ge=1)
    """Of the fit. Other numbers may give other last bits, and so other clusters."""
    gpus: int = Field(0, ge=0)
    """Of the fit, by the extra `faiss-gpu`."""
    copies: CopiesConfig = CopiesConfig()
    duplicates: DuplicatesConfig = DuplicatesConfig()
    per_cluster: int = Field(20, ge=1)
    """Representatives a cluster."""
    shard_size: int = Field(500, ge=1, le=1000)
    """Samples a shard of the selected dataset."""


class Hosting(ConfigModel):
    """What each worker of an expert gets. Only `threads` may change what comes out."""

    gpus: float = Field(0.0, ge=0)
    """GPUs a worker; below 1 several share one, such as 0.25. 0: the expert runs on the CPU."""
    cpus: float = Field(1.0, gt=0)
    """Reserved for each worker."""
    threads: int = Field(1, ge=1)
    """Of the model on the CPU. Many workers of one thread are faster than few of many."""
    workers: int | None = Field(None, ge=1)
    """Default: as many as the cluster's GPUs (or CPUs) hold."""
    memory_gb: float = Field(0.0, ge=0)
    """Reserved for each worker."""


class ExpertChoice(ConfigModel):
    """One expert, with its own settings and what its workers get."""

    expert: str
    name: str
    """Of its table; another name than the expert's lets two versions of it stand side by side."""
    config: SerializeAsAny[ExpertConfig]
    hosting: Hosting = Hosting()
    tiles: TilesConfig | None = None
    """For detectors: large images are looked at in parts, too."""

    def to_plain(self) -> dict[str, Any]:
        """As it is written in a config."""
        settings = self.config.model_dump(mode="json")
        hosting = self.hosting.model_dump(mode="json", exclude_defaults=True)
        if self.name != self.expert:
            settings = {"name": self.name, **settings}
        if hosting:
            settings["hosting"] = hosting
        if self.tiles:
            settings["tiles"] = self.tiles.model_dump(mode="json")
        return {self.expert: settings}


_TABLE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,60}")


def _expert_choice(value: object) -> object:
    """`nanodet`, `{nanodet: {score_floor: 0.2}}`, `{owlv2: {name: owlv2-large, model: ..., hosting:
    {gpus: 0.5}}}`."""
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError(
            "an expert is a name, or a name with its settings: {nanodet: {score_floor: 0.2}}; this "
            f"has {len(value)} keys: {', '.join(map(str, value))}"
        )
    ((expert, settings),) = value.items()
    loaded = load_expert(str(expert))
    if not isinstance(settings or {}, dict):
        raise ValueError(f"{expert}: expected a mapping of settings")
    settings = {**(settings or {})}
    default = str(expert).rpartition(":")[2].lower()  # of `module:Class`, the class
    name, hosting = settings.pop("name", default), settings.pop("hosting", {})
    tiles = settings.pop("tiles", None)
    if tiles is not None and (loaded.kind != EvidenceKind.OBJECTS or loaded is ParquetObjects):
        raise ValueError(f"{expert}.tiles: only detectors that look at images have tiles")
    if not (isinstance(name, str) and _TABLE_NAME.fullmatch(name)) or name == MERGED:
        raise ValueError(
            f"{expert}.name: a table's name has lower-case letters, digits, dots, dashes and "
            f"underscores, and {MERGED!r} is taken"
        )
    checked: dict[str, BaseModel] = {}
    parts: list[tuple[str, Any, type[BaseModel]]]
    parts = [("", settings, loaded.Config), ("hosting.", hosting, Hosting)]
    parts += [("tiles.", tiles, TilesConfig)] if tiles is not None else []
    for part, given, model in parts:
        try:
            checked[part] = model.model_validate(given)
        except ValidationError as error:
            # Told here: pydantic would name the fields without their expert.
            lines = [_explain(detail, model) for detail in error.errors(include_input=False)]
            raise ValueError("; ".join(f"{expert}.{part}{line}" for line in lines)) from error
    return {
        "expert": expert,
        "name": name,
        "config": checked[""],
        "hosting": checked["hosting."],
        "tiles": checked.get("tiles."),
    }


def _expert_choices(value: object) -> object:
    return [_expert_choice(item) for item in value] if isinstance(value, list) else value


def _no_twins(value: list[ExpertChoice]) -> list[ExpertChoice]:
    names = [choice.name for choice in value]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{name!r} is there twice: give one of them a name of its own, such as "
                f"{{{name}: {{name: {name}-2, ...}}}}"
            )
    return value


class BlurConfig(ConfigModel):
    """What is made unrecognisable in exported images: faces, unless another detector is named. The
    data set keeps its images as they are, and prompts are told nothing of these boxes."""

    experts: list[ExpertChoice] = Field(["centerface"], min_length=1, validate_default=True)
    """Detectors of what is hidden."""
    labels: tuple[str, ...] = ()
    """Labels of these detectors, in any case; none: all that they find."""
    score: float = Field(0.3, ge=0, le=1)
    """Boxes of at least this score: lower hides more, and sometimes what is none."""

    _choices = field_validator("experts", mode="before")(_expert_choices)
    _no_twins = field_validator("experts")(_no_twins)

    @field_validator("experts")
    @classmethod
    def _find_boxes_alone(cls, value: list[ExpertChoice]) -> list[ExpertChoice]:
        for choice in value:
            expert = load_expert(choice.expert)
            if expert.kind != EvidenceKind.OBJECTS or expert.uses_tags:
                raise ValueError(
                    f"{choice.name} is no detector that works without tags; centerface, nanodet, "
                    "transformers-detector and ultralytics are"
                )
        return value

    @model_validator(mode="after")
    def _labels_can_be_told(self) -> "BlurConfig":
        known = [getattr(load_expert(choice.expert), "labels", None) for choice in self.experts]
        if all(known):  # of checkpoints it is known once they are loaded
            there = {label.casefold() for labels in known for label in labels or ()}
            for label in self.labels:
                if label.strip().casefold() not in there:
                    near = difflib.get_close_matches(label, there, 3, 0.0)
                    raise ValueError(
                        f"labels: no detector here finds {label!r}; nearest: {', '.join(near)}"
                    )
        return self

    @model_validator(mode="after")
    def _unsure_boxes_are_told(self) -> "BlurConfig":
        for choice in self.experts:
            floor = getattr(choice.config, "score_floor", 0.0)
            if floor > self.score:
                raise ValueError(
                    f"score: {self.score} hides no more than {floor}, since {choice.name} does not "
                    f"tell what it is less sure of: {{{choice.expert}: {{score_floor: "
                    f"{self.score}}}}}"
                )
        return self


class SampleConfig(ConfigModel):
    """Caption a part of the selected images: the paper's meta set is 100K of 1M."""

    size: int = Field(100_000, ge=1)
    """Rows; when there are fewer, all."""
    seed: int = 0
    """Another one draws other rows."""
    by: Literal["plain", "strata"] = "plain"
    """`plain`: at random. `strata`: in proportion to cluster and whether an expert read text, and
    at least one row of each as far as `size` allows."""


class CaptionConfig(ConfigModel):
    template: str = "engine-v1"
    """`engine-v1` or `meta-v1`, or the path of your own, `*.jinja` (docs/captions.md)."""
    engine: EngineChoice = EngineChoice(composer=ComposerConfig(), name="composer")
    """Or the name of one of `engines`."""
    engines: dict[str, EngineChoice] = Field(default_factory=dict)
    """Engines to choose from, each with a table of its own: `captions/<name>`."""
    sample: SampleConfig | None = None
    """Which rows are captioned: `{size: 100000, seed: 0, by: plain}`; null: all."""
    max_words: int = Field(192, ge=1)
    """A longer caption breaks a rule (docs/policies.md)."""
    repair: bool = False
    """Ask an endpoint once more for a caption that breaks rules, and keep the better one. Costs a
    second request for each; for a general model, not for one trained on single turns."""

    @model_validator(mode="before")
    @classmethod
    def _chosen(cls, value: object) -> object:
        """Engines get the names that they are listed under; `engine` may be such a name."""
        if not isinstance(value, dict) or not isinstance(value.get("engines") or {}, dict):
            return value
        engines = {
            name: {**engine, "name": name} if isinstance(engine, dict) else engine
            for name, engine in (value.get("engines") or {}).items()
        }
        engine = value.get("engine")
        if isinstance(engine, str) and engine in engines:
            engine = engines[engine]
        elif isinstance(engine, str) and engines and engine != "composer":
            raise ValueError(f"engine: no engine is called {engine!r}; known: {', '.join(engines)}")
        chosen = {} if engine is None else {"engine": engine}
        return {**value, **chosen, "engines": engines}

    @field_validator("template")
    @classmethod
    def _known(cls, value: str) -> str:
        if value.endswith(".jinja"):
            value = str(Path(value).expanduser().resolve())  # for workers, which run elsewhere
        check_template(value)
        name = template_name(value)
        if value != name and (name in template_names() or not _TABLE_NAME.fullmatch(name)):
            raise ValueError(
                f"{value}: tables are called after the file: give it another name, of lower-case "
                "letters, digits, dots, dashes and underscores"
            )
        return value


class RunnerConfig(ConfigModel):
    """How steps run. Nothing here changes what comes out, but for images that exceed a limit."""

    ray_address: str | None = None
    """`auto` or an address; by default a Ray of its own is started for the run."""
    workers: int | None = Field(None, ge=1)
    """CPUs of a Ray started for the run, and so one-thread workers; default: all."""
    dashboard: bool = False
    """Start Ray's dashboard with a Ray of the run's own."""
    max_failure_rate: float = Field(0.5, ge=0, le=1)
    """Share of rows that may fail in a stage before the run stops."""
    fuse_after_rows: int = Field(50, ge=1)
    """Rows of a stage that are seen before `max_failure_rate` counts."""
    worker_memory_gb: float | None = Field(None, gt=0)
    """A worker process that grows above this is ended and its images are examined one by one.
    Default: the workers' share of 80 % of the machine, at least 2 GiB."""
    stall_minutes: float = Field(10, gt=0)
    """A worker that makes no progress for so long is ended and examined likewise."""
    image_seconds: float = Field(120, gt=0)
    """How long an image may take that is examined alone."""
    drain_seconds: float = Field(60, ge=0)
    """After SIGTERM the steps that have begun get so long to finish."""


class ReportConfig(ConfigModel):
    cards: int = Field(48, ge=0)
    """Samples shown with all their evidence."""
    groups: int = Field(24, ge=0)
    """Duplicate groups shown side by side."""
    seed: int = 0
    """Of the draw of cards and groups."""


Filter = tuple[str, Literal["==", "!=", "<", "<=", ">", ">=", "in", "not in"], Any]
"""Column, operator, value."""


def _can_be_compared(value: object) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


class ExportConfig(ConfigModel):
    """Which of the captioned samples are exported."""

    where: list[Filter] = Field(default_factory=list)
    """All of these hold, such as `[look.sharpness, ">", 15]`; columns are called as in
    docs/reading.md. A value that is null holds for none."""

    @field_validator("where", mode="before")
    @classmethod
    def _filters(cls, value: object) -> object:
        if not isinstance(value, list) or not all(
            isinstance(one, list | tuple) and len(one) == 3 for one in value
        ):
            raise ValueError(
                'a list of [column, operator, value], such as [[look.sharpness, ">", 15]]'
            )
        for column, operator, wanted in value:
            is_list = operator in ("in", "not in")
            if isinstance(wanted, list) != is_list:
                what = "a list, such as [portrait, square]" if is_list else "one value, no list"
                raise ValueError(f"{column}: {operator!r} needs {what}")
            values = wanted if is_list else [wanted]
            if not values or not all(_can_be_compared(one) for one in values):
                raise ValueError(f"{column}: {wanted!r} is no number, text or truth value")
        return value


def _whole(place: str) -> str:
    """A folder here or a URL, as one that lies in it begins."""
    path = place.removeprefix("file://")
    return (path if "://" in path else str(Path(path).resolve())).rstrip("/") + "/"


_OF_TAGGERS = {"vocabulary", "templates", "score_floor", "max_tags"}
"""Settings that a model has as a tagger alone."""


class Config(ConfigModel):
    run: str
    """Folder of all outputs."""
    source: SourceConfig
    filter: FilterConfig = FilterConfig()
    select: SelectConfig = SelectConfig()
    alt_text: AltTextConfig = AltTextConfig()
    relevance: ExpertChoice | None = None
    """An image-text model that says how well alt texts fit their images."""
    experts: list[ExpertChoice] = Field(default_factory=list, validate_default=True)
    """Whose evidence prompts and captions are made from."""
    scores: list[ExpertChoice] = Field(default_factory=list)
    """Experts that score images as a whole, for choosing among them."""
    look: bool = False
    """Measure sharpness, exposure, JPEG quality and colours, too."""
    merge: MergeConfig = MergeConfig()
    hints: HintConfig = HintConfig()
    caption: CaptionConfig = CaptionConfig()
    export: ExportConfig = ExportConfig()
    blur: BlurConfig | None = None
    runner: RunnerConfig = RunnerConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _apart(self) -> "Config":
        place = self.source.folder or self.source.webdataset or ""
        if _whole(self.run).startswith(_whole(place)):
            raise ValueError(
                f"run: {self.run} lies inside the source {place}: outputs would become input"
            )
        return self

    _score_choices = field_validator("scores", mode="before")(_expert_choices)
    _no_twins = field_validator("experts", "scores")(_no_twins)

    @field_validator("experts", mode="before")
    @classmethod
    def _choices(cls, value: object) -> object:
        return _expert_choices([*SHIPPED] if value == [] else value)

    @field_validator("experts", "scores")
    @classmethod
    def _in_their_place(cls, value: list[ExpertChoice], info: ValidationInfo) -> list[ExpertChoice]:
        for choice in value:
            scores = load_expert(choice.expert).kind is EvidenceKind.SCORES
            if scores != (info.field_name == "scores"):
                what = "scores images as a whole" if scores else "makes evidence"
                place = "scores" if scores else "experts"
                raise ValueError(f"{choice.expert} {what}: put it under `{place}`")
        return value

    @field_validator("blur", mode="before")
    @classmethod
    def _blur_or_not(cls, value: object) -> object:
        if isinstance(value, bool):
            return {} if value else None
        if not isinstance(value, dict | BlurConfig):  # an empty `blur:` may mean either
            raise ValueError("say `true` (faces are blurred), `false`, or {experts: [...], ...}")
        return value

    @field_validator("relevance", mode="before")
    @classmethod
    def _scores_texts(cls, value: object) -> object:
        choice = _expert_choice(value)
        if not isinstance(choice, dict):
            return choice
        name = choice["expert"]
        if name not in MODELS:
            raise ValueError(f"{name} has no model for texts; {' and '.join(MODELS)} do")
        if idle := choice["config"].model_fields_set & _OF_TAGGERS:
            raise ValueError(f"{name}.{min(idle)}: a setting of taggers; leave it out here")
        return choice

    @model_validator(mode="after")
    def _texts_are_scored(self) -> "Config":
        if self.alt_text.min_relevance and self.relevance is None:
            raise ValueError(
                "alt_text.min_relevance: no model scores the texts; name one under `relevance`"
            )
        return self

    @model_validator(mode="after")
    def _queries_come_from_taggers(self) -> "Config":
        kinds = {load_expert(choice.expert).kind for choice in self.experts}
        for choice in self.experts:
            if load_expert(choice.expert).uses_tags and EvidenceKind.TAGS not in kinds:
                raise ValueError(
                    f"experts: {choice.name} looks for what a tagger has named: add a tagger"
                )
        return self

    def to_plain(self) -> dict[str, Any]:
        """Every setting, defaults included, as a mapping that can be loaded again."""
        plain = self.model_dump(mode="json")
        plain["relevance"] = None
        if self.relevance is not None:
            plain["relevance"] = self.relevance.to_plain()
            for name in _OF_TAGGERS:
                plain["relevance"][self.relevance.expert].pop(name, None)
        plain["experts"] = [choice.to_plain() for choice in self.experts]
        plain["scores"] = [choice.to_plain() for choice in self.scores]
        if self.blur is None:
            plain["blur"] = False
        else:
            plain["blur"]["experts"] = [choice.to_plain() for choice in self.blur.experts]
        plain["source"] = {k: v for k, v in plain["source"].items() if v is not None}
        caption = plain["caption"]
        caption["engine"] = _without_none(caption["engine"])
        caption["engines"] = {n: _without_none(e) for n, e in caption["engines"].items()}
        return plain

    def to_yaml(self) -> str:
        """`to_plain` as a config file that can be run."""
        return yaml.safe_dump(self.to_plain(), sort_keys=False, allow_unicode=True)


def _without_none(engine: dict[str, Any]) -> dict[str, Any]:
    return {kind: settings for kind, settings in engine.items() if settings is not None}


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file, with `a.b=value` overrides (values are YAML).

    Raises ConfigError, whose message names the file, the field and the fix.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file. Ready ones are in configs/.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(raw).__name__}")
    for override in overrides:
        _apply(raw, override)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors(include_input=False)]
        raise ConfigError("\n".join(f"{path}: {line}" for line in lines)) from error


def _apply(raw: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"{override!r}: expected key=value, for example select.clusters=12")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{override!r}: the value is not valid YAML: {error}") from error
    *parents, leaf = name.split(".")
    here = raw
    for parent in parents:
        if isinstance(here.get(parent), list):
            raise ConfigError(f"{override!r}: {parent} is a list: give it whole, {parent}=[...]")
        if not isinstance(here.get(parent), dict):
            here[parent] = {}
        here = here[parent]
    here[leaf] = value


def _explain(detail: Any, model: type[BaseModel] = Config) -> str:
    field = ".".join(str(part) for part in detail["loc"]) or "config"
    if detail["type"] == "extra_forbidden":
        known = _fields_at(model, detail["loc"][:-1])
        near = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{field}: unknown setting; {hint}"
    if detail["type"] == "missing":
        return f"{field}: this setting is missing"
    return f"{field}: {detail['msg'].removeprefix('Value error, ')}"


def _fields_at(top: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Names of the settings that a place in the config knows."""
    model: Any = top
    for part in location:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
    return list(getattr(model, "model_fields", {}))

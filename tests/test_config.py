"""Configs: errors that name file, field and fix; what is printed can be run again."""

import re
from pathlib import Path

import pytest
import yaml

from fusion_pipeline.config import Config, ConfigError, load_config

REPOSITORY = Path(__file__).parent.parent
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
SMALL = "run: out\nsource: {folder: in}\n"
ENDPOINT = "{endpoint: {url: 'http://127.0.0.1:1/v1', model: a/B-7b, key_env: MY_KEY}}"


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("more", "field", "fix"),
    [
        ("selct: {}", "selct", "unknown setting; did you mean 'select'?"),
        ("select: {cluster: 3}", "select.cluster", "did you mean 'clusters'?"),
        ("select: {copies: {prob: 3}}", "select.copies.prob", "did you mean 'probes'?"),
        ("filter: {xyz: 1}", "filter.xyz", "known here: min_short_edge"),
        ("filter: {min_short_edge: tall}", "filter.min_short_edge", "integer"),
        ("filter: {min_short_edge: 0}", "filter.min_short_edge", "greater than or equal to 1"),
        ("filter: 448", "filter", "dictionary"),
        ("select: {duplicates: {rule: random}}", "select.duplicates.rule", "'greedy'"),
        ("runner: {max_failure_rate: 2}", "runner.max_failure_rate", "less than or equal to 1"),
        ("experts: nanodet", "experts", "list"),
        ("experts: [nanodt]", "experts", "did you mean 'nanodet'? Known: "),
        ("export: {where: [look.sharpness, '>', 3]}", "export.where", "a list of [column, op"),
        ("export: {where: [[look.sharpness, '=', 3]]}", "export.where.0.1", "'=='"),
        ("export: {where: [[look.layout, in, wide]]}", "export.where", "'in' needs a list"),
        ("export: {where: [[look.layout, ==, [wide]]]}", "export.where", "'==' needs one value"),
        ("export: {where: [[look.layout, ==, null]]}", "export.where", "None is no number, text"),
        ("experts: ['nowhere.here:Me']", "experts", "'nowhere.here:Me' can't be imported: No"),
        ("experts: ['experts.base:Hardware']", "experts", "is no expert: it has no `kind`"),
        ("experts: [nanodet, yolo]", "experts", "no expert is called 'yolo'; known: "),
        ("experts: [nanodet, rapidocr, nanodet]", "experts", "'nanodet' is there twice"),
        ("experts: [nanodet, nanodet: {score_floor: 0.2}]", "experts", "there twice"),
        ("experts: [nanodet: {score_flor: 0.2}]", "experts",
         "nanodet.score_flor: unknown setting; did you mean 'score_floor'?"),
        ("experts: [nanodet: {tiles: {}}]", "experts",
         "nanodet.tiles.edge: this setting is missing"),
        ("experts: [nanodet: {tiles: {edge: 9, overlp: 0}}]", "experts",
         "nanodet.tiles.overlp: unknown setting; did you mean 'overlap'?"),
        ("experts: [rapidocr: {tiles: {edge: 640}}]", "experts",
         "rapidocr.tiles: only detectors that look at images have tiles"),
        ("experts: [nanodet: {score_floor: x}]", "experts",
         "nanodet.score_floor: Input should be a valid number"),
        ("experts: [nanodet, nsfwjs]", "experts", "scores images as a whole: put it under"),
        ("scores: [nanodet]", "scores", "nanodet makes evidence: put it under `experts`"),
        ("scores: [nsfwjs, nsfwjs]", "scores", "'nsfwjs' is there twice"),
        ("blur:", "blur", "say `true` (faces are blurred), `false`"),
        ("blur: [centerface]", "blur", "{experts: [...], ...}"),
        ("blur: {labels: [faces]}", "blur", "no detector here finds 'faces'; nearest: face"),
        ("blur: {score: 0.1}", "blur", "score: 0.1 hides no more than 0.3, since centerface"),
        ("blur: {experts: []}", "blur.experts", "at least 1 item"),
        ("blur: {experts: [rapidocr]}", "blur.experts", "rapidocr is no detector"),
        ("blur: {experts: [owlv2: {model: a/b, revision: "
         f"{'a' * 40}}}]}}", "blur.experts", "works without tags"),
        ("blur: {experts: [nanodet, nanodet]}", "blur.experts", "'nanodet' is there twice"),
        ("blur: {lables: [face]}", "blur.lables", "did you mean 'labels'?"),
        ("caption: {template: mine}", "caption.template", "no template is called 'mine'; known: "),
        ("caption: {sample: {siz: 3}}", "caption.sample.siz", "did you mean 'size'?"),
        ("caption: {sample: {by: random}}", "caption.sample.by", "'plain' or 'strata'"),
        ("caption: {engine: gpt}", "caption.engine", "composer"),
        ("caption: {engine: {}}", "caption.engine", "exactly one engine: composer, endpoint"),
        ("caption: {engine: {endpoint: {url: 'http://h', modl: x}}}",
         "caption.engine.endpoint.modl", "did you mean 'model'?"),
        ("caption: {engine: {endpoint: {url: 'ftp://h', model: x}}}",
         "caption.engine.endpoint.url", "http:// or https://"),
    ],
)  # fmt: skip
def test_an_error_names_file_field_and_fix(more: str, field: str, fix: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, SMALL + more)
    lines = str(raised.value).splitlines()
    assert all(line.startswith(f"{tmp_path}/my.yaml: ") for line in lines), lines
    assert any(f"my.yaml: {field}: " in line and fix in line for line in lines), lines
    assert "pydantic" not in str(raised.value)


@pytest.mark.parametrize(
    ("source", "field", "fix"),
    [
        ("{}", "source", "exactly one of source.webdataset and source.folder"),
        ("{folder: a, webdataset: b}", "source", "exactly one of"),
        ("{folder: a, shard_size: 1001}", "source.shard_size", "less than or equal to 1000"),
    ],
)
def test_a_source_is_one_place(source: str, field: str, fix: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"my\.yaml: {field}: .*{re.escape(fix)}"):
        load(tmp_path, f"run: out\nsource: {source}\n")


def test_every_error_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, "source: {folder: in, shard_size: 0}\nfiltr: {}\n")
    assert [line.split(": ")[1] for line in sorted(str(raised.value).splitlines())] == [
        "filtr", "run", "source.shard_size",
    ]  # fmt: skip
    assert "run: this setting is missing" in str(raised.value)


@pytest.mark.parametrize("text", ["- a\n", "just text", "", "a: [1,", "\ta: 1"])
def test_what_is_no_config_is_named(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"my\.yaml: (expected a mapping|not valid YAML)"):
        load(tmp_path, text)


def test_a_path_that_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml: no such file\. Ready ones are in con"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml: not valid YAML"):
        load_config(tmp_path / "binary.yaml")


def test_overrides_are_yaml_and_win(tmp_path: Path) -> None:
    config = load(
        tmp_path, SMALL + "select: {clusters: 5}\n", "select.clusters=12", "run=other place",
        "select.duplicates.rule=semdedup", "experts=[nanodet: {score_floor: 0.3}]",
        "caption.engine.composer={}", "runner.workers=null", "source.folder=a=b",
    )  # fmt: skip
    assert (config.select.clusters, config.run) == (12, "other place")
    assert config.select.duplicates.rule == "semdedup"
    assert [e.name for e in config.experts] == ["nanodet"]
    assert config.experts[0].config.model_dump()["score_floor"] == 0.3
    assert config.source.folder == "a=b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("clusters", "expected key=value, for example"),
        ("=5", "expected key=value"),
        ("select.clusters=[", "not valid YAML"),
        ("select.cluster=5", "did you mean 'clusters'"),
        ("select.clusters=many", "select.clusters: .*integer"),
        ("select=5", "select: "),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, SMALL, override)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_ready_configs_load(path: Path) -> None:
    config = load_config(path)
    assert config.experts


def resolved(config: Config, tmp_path: Path) -> Config:
    path = tmp_path / "resolved.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    return load_config(path)


def test_what_is_printed_loads_again_to_an_equal_config(tmp_path: Path) -> None:
    texts = [path.read_text() for path in CONFIGS] + [
        SMALL,
        SMALL + f"caption: {{engine: {ENDPOINT}}}\n",
        SMALL + "caption: {engine: {name: mine, composer: {}}}\n",
        "run: 'Ordner ü: #1'\nsource: {webdataset: 's3://b/x'}\n"
        "experts: [nanodet: {score_floor: 0.125, tiles: {edge: 800}}, rapidocr]\n"
        "select: {copies: {probes: 3}}\n",
        SMALL + "look: true\nblur: true\nscores: [nsfwjs]\n",
        SMALL
        + "blur: {experts: [{nanodet: {name: people}}, centerface], labels: [person, face]}\n",
    ]
    for text in texts:
        config = load(tmp_path, text)
        again = resolved(config, tmp_path)
        assert again == config
        assert again.to_yaml() == config.to_yaml()
        plain = yaml.safe_load(config.to_yaml())
        assert plain["select"]["copies"]["rule"], "defaults are printed, too"


def test_engines_are_named_after_their_model(tmp_path: Path) -> None:
    assert load(tmp_path, SMALL).caption.engine.name == "composer"
    assert load(tmp_path, SMALL + f"caption: {{engine: {ENDPOINT}}}").caption.engine.name == "b-7b"


def test_no_key_is_ever_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "sk-very-secret-0123456789"
    monkeypatch.setenv("MY_KEY", secret)
    config = load(tmp_path, SMALL + f"caption: {{engine: {ENDPOINT}}}")
    assert "key_env: MY_KEY" in config.to_yaml()
    assert secret not in config.to_yaml() + repr(config) + str(config.to_plain())
    for wrong in (
        f"{{endpoint: {{url: 'http://u:{secret}@h/v1', model: m}}}}",
        f"{{endpoint: {{url: 'http://h', model: m, key_env: {secret}}}}}",
        f"{{endpoint: {{url: 'http://h', model: m, api_key: {secret}}}}}",
    ):
        with pytest.raises(ConfigError) as raised:
            load(tmp_path, SMALL + f"caption: {{engine: {wrong}}}")
        assert secret not in str(raised.value)


def test_two_ways_to_say_the_same_are_equal(tmp_path: Path) -> None:
    assert load(tmp_path, SMALL + "blur: true") == load(tmp_path, SMALL + "blur: {}")
    assert load(tmp_path, SMALL + "blur: false") == load(tmp_path, SMALL)
    default = load(tmp_path, SMALL)
    assert default == load(tmp_path, SMALL + "experts: []\ncaption: {engine: composer}\n")
    short = load(tmp_path, SMALL + "experts: [nanodet]")
    assert short == load(tmp_path, SMALL + "experts: [{nanodet: {}}]")
    assert short == load(tmp_path, SMALL + "experts:\n  - nanodet:\n")


def test_a_part_of_a_list_cannot_be_overridden(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"experts is a list: give it whole, experts=\[...\]"):
        load(tmp_path, SMALL + "experts: [nanodet]", "experts.0=clip")


def test_outputs_never_lie_in_the_source(tmp_path: Path) -> None:
    for place, run in (
        ("in", "in/out"), ("in", "./in"), ("file:///data", "/data/out"), ("s3://b/in/", "s3://b/in/out"),
        ("s3://b/in", "s3://b/in"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="lies inside the source"):
            load(tmp_path, f"run: {run}\nsource: {{webdataset: '{place}'}}")
    for place, run in (("in", "in2"), ("s3://b/in", "s3://b/in-out"), ("s3://b/in", "out")):
        load(tmp_path, f"run: {run}\nsource: {{webdataset: '{place}'}}")


PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text("utf-8"), re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_what_the_pages_show_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in re.findall(r"checkpoints/[\w.-]+", block):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for template in re.findall(r"prompts/[\w.-]+", block):
        (tmp_path / template).parent.mkdir(exist_ok=True)
        (tmp_path / template).write_text("What is this?")
    shown = yaml.safe_load(block.replace("<commit>", "a" * 40).replace("0b7c...", "b" * 64))
    if isinstance(shown, list):
        shown = {"experts": shown}
    load(tmp_path, yaml.safe_dump({"run": "out", "source": {"folder": "in"}, **shown}))

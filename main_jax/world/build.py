"""Builds what a user would bring: data files and a pre-trained checkpoint in Hugging Face format.

From here on the run on the embedded world takes exactly the path of a run on one's own files. The truth
lies in its own file, `truth.json`, which only `evaluate` and the oracle arm open.
"""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
from etils import epath

from main_jax.config import WorldSettings
from main_jax.lm.arch import DecoderConfig
from main_jax.lm.batches import Example, Unit
from main_jax.lm.checkpoint import stored_params
from main_jax.lm.hf import save_checkpoint
from main_jax.lm.model import Decoder
from main_jax.lm.multihost import first
from main_jax.lm.train import fit
from main_jax.pairs import write_atomically, write_json
from main_jax.run import Run, derive_seed
from main_jax.weighting import Weighting
from main_jax.world import WORLD_POSITIONS
from main_jax.world.generate import make_world, pretraining_documents
from main_jax.world.vocabulary import build_tokenizer, save_tokenizer


def build(run: Run, out: epath.Path) -> dict[str, int]:
    """Writes seed.jsonl, responses.jsonl, tests.json, truth.json and the base checkpoint `base/`."""
    settings = run.config.world
    assert settings is not None
    world = make_world(
        run.config.seed,
        noise=settings.noise,
        seed_pairs=settings.seed_pairs,
        responses=settings.responses,
        test_questions=settings.test_questions,
    )
    for name, rows in (("seed", world.seed), ("responses", world.responses)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(out / f"{name}.jsonl", lambda path, text=text: path.write_text(text))
    write_json(out / "tests.json", world.tests)
    write_json(out / "truth.json", dataclasses.asdict(world.truth))
    _pretrain(run, out)
    counts = {"seed_pairs": len(world.seed), "responses": len(world.responses)}
    return counts | {"documents": settings.documents}


def _pretrain(run: Run, out: epath.Path) -> None:
    settings = run.config.world
    assert settings is not None
    tokenizer, config = build_tokenizer(), decoder_config(settings)
    decoder = Decoder(config)
    bos, eos = (tokenizer.token_to_id(token) for token in ("<bos>", "<eos>"))
    documents = pretraining_documents(run.config.seed, settings.documents)
    units = []
    for encoding in tokenizer.encode_batch(documents):
        tokens = np.asarray([bos, *encoding.ids, eos], np.int32)
        example = Example(tokens, np.arange(len(tokens)) > 0)
        units.append(Unit((example,), ({"weight": 1.0, "aligned": False},)))
    fit(
        decoder,
        lambda: decoder.init(jax.random.key(derive_seed(run.config.seed, "world/init"))),
        units,
        settings.pretraining,
        directory=out / "pretraining",
        weighting=Weighting(strategy="constant"),
        seed=derive_seed(run.config.seed, "world/pretraining"),
        label="world pretraining",
        limit=WORLD_POSITIONS,
        reporting=run.reporting,
    )
    params = stored_params(out / "pretraining" / "checkpoints")
    special = {"bos_token_id": bos, "eos_token_id": eos}
    save_checkpoint(out / "base", config, params, fields=special)
    if first():
        save_tokenizer(str(out / "base"))


def decoder_config(settings: WorldSettings) -> DecoderConfig:
    """The base model of the world: LLaMA-shaped, 4 query heads to 2 key-value heads."""
    d = settings.hidden_size
    return DecoderConfig(
        vocab_size=build_tokenizer().get_vocab_size(),
        hidden_size=d,
        intermediate_size=d * 5 // 2,
        num_layers=settings.num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=d // 4,
        max_position_embeddings=WORLD_POSITIONS,
    )

"""The configuration: every choice composes, and every mistake names the setting and the fix."""

import itertools
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from colospec import config
from colospec.config import Mode
from colospec.draft import catalog


@pytest.fixture(scope="module", autouse=True)
def hydra_app():
    config.register()
    catalog.register()
    OmegaConf.register_new_resolver("run_directory", lambda _: "outputs/test", replace=True)
    with initialize_config_dir(str(config.CONF_DIR), version_base="1.3"):
        yield


def load(*words):
    return config.load(compose("config", overrides=list(words)))


def options(group):
    return sorted(p.stem for p in (config.CONF_DIR / group).glob("*.yaml"))


@pytest.mark.parametrize(
    ("mode", "draft", "engine", "tracker"),
    list(itertools.product(*map(options, ("mode", "draft", "engine", "tracker")))),
)
def test_every_combination_of_groups_composes(mode, draft, engine, tracker):
    run = load(f"+mode={mode}", f"draft={draft}", f"engine={engine}", f"tracker={tracker}")
    assert run.mode is Mode[mode]
    assert run.engine.name == engine
    assert run.draft.algorithm == draft
    assert type(run.draft) is catalog.find(draft).config


@pytest.mark.parametrize("group", ["target", "mps", "data", "trainer"])
def test_every_choice_of_the_other_groups_composes(group):
    for option in options(group):
        assert load("+mode=colocate", f"{group}={option}").mode is Mode.colocate


@pytest.mark.parametrize("experiment", options("experiment"))
def test_experiment_and_mode_give_the_same_run_in_both_orders(experiment):
    first = load("+mode=colocate", f"+experiment={experiment}")
    second = load(f"+experiment={experiment}", "+mode=colocate")
    assert first == second
    assert first != load("+mode=colocate"), "the experiment changes something"


def test_the_command_line_wins_over_experiment_and_mode():
    run = load("+experiment=demo", "+mode=colocate", "trainer.lr=0.125")
    assert run.trainer.lr == 0.125


def test_a_local_target_needs_no_group():
    assert load("+mode=colocate", "target.path=/models/x").target.path == "/models/x"


def test_missing_mode_lists_the_modes():
    with pytest.raises(ValueError, match=r"\+mode=alternate or \+mode=colocate"):
        load()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data.token_budget=100"], "data.token_budget=100 is less than data.max_length=2048"),
        (["trainer.min_lr=1"], "trainer.min_lr=1.0 is above"),
        (["trainer.betas=[0.9]"], "two numbers"),
        (["memory.trainer_fraction=0.8"], "above 1"),
        (["trainer.dtype=float16"], "bfloat16 or float32"),
        (["export.dtype=auto"], "export.dtype=auto does not exist"),
        (["launch.nodes=2"], "launch.rdzv_endpoint"),
        (["launch.nodes=2", "launch.rdzv_endpoint=a:1"], "run_dir"),
        (["launch.gpus=many"], "auto or a number"),
        (["draft.aux_layer_ids=[1,1]"], "distinct"),
        (["draft=dflash", "draft.block_size=1"], "draft.block_size=1 must be at least 2"),
        (["draft=dflash", "draft.sliding_layers=[5]"], "layers of the draft, 0 to 4"),
        (["draft=dflash", "draft.sliding_window=9"], "need each other"),
        (["draft=dflash", "draft.max_blocks=0"], "draft.max_blocks=0 must be at least 1"),
        (["draft=dflash", "draft.dpace_alpha=2"], r"in \[0, 1\]"),
        (["draft.ttt_length=0"], "draft.ttt_length=0 must be at least 1"),
        (["trainer.accumulation=0"], "trainer.accumulation=0 must be at least 1"),
        (["trainer.warmup_fraction=2"], r"in \[0, 1\]"),
        (["trainer.max_grad_norm=0"], "above 0"),
        (["trainer.lr=nan"], "trainer.lr=nan"),
        (["trainer.eval_interval=5"], "nothing to evaluate on; set data.held_out_samples"),
        (["trainer.probe_interval=5"], "trainer.probe_interval=5 has nothing to evaluate on"),
        (["trainer.best_metric=eval/loss"], "never measured; set trainer.eval_interval"),
        (
            [
                "trainer.best_metric=probe/real_acceptance_length",
                "trainer.probe_interval=4",
                "data.held_out_samples=9",
                "trainer.save_interval=6",
            ],
            "set trainer.save_interval to a multiple",
        ),
        (
            [
                "trainer.probe_interval=5",
                "trainer.probe_prompts=64",
                "trainer.probe_tokens=100",
                "data.held_out_samples=64",
            ],
            "set trainer.probe_tokens=64",
        ),
        (["trainer.probe_alarm=0"], "above 0"),
        (["seed=-1"], "seed=-1 must be at least 0"),
        (["limit.step_s=0"], "limit.step_s=0.0 must be above 0"),
    ],
)
def test_values_that_cannot_work_name_the_setting(words, says):
    with pytest.raises(ValueError, match=says):
        load("+mode=colocate", *words)


def test_alternate_refuses_tensor_parallel_engines():
    with pytest.raises(ValueError, match=r"engine.tp=2 does not work in mode=alternate"):
        load("+mode=alternate", "engine.tp=2")


def test_no_yaml_repeats_a_default_of_the_schema():
    for group, default in (("trainer", config.TrainerConfig()), ("data", config.DataConfig())):
        for name in options(group):
            values = OmegaConf.to_container(
                OmegaConf.load(config.CONF_DIR / group / f"{name}.yaml")
            )
            for key, value in (values or {}).items():
                if key != "path":
                    assert getattr(default, key) != value, f"{group}/{name}.yaml: {key}"


def run_module(*words, env=None):
    return subprocess.run(
        [sys.executable, "-m", "colospec.run", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env=env,
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "+mode=colocate"),
        (["+mode=colocat"], "mode=colocat does not exist; choose from alternate, colocate"),
        (["mode=colocate"], "+mode=colocate"),
        (["+mode=colocate", "trainer.lrr=1"], "no setting trainer.lrr; did you mean trainer.lr"),
        (["+mode=colocate", "+trainer.lrr=1"], "no setting trainer.lrr; did you mean trainer.lr"),
        (["+mode=colocate", "trainr.lr=1"], "no setting trainr; did you mean trainer?"),
        (["+mode=colocate", "+foo=1"], "there is no setting foo; there are data, draft, "),
        (["+mode=colocate", "++draft.ttt_len=1"], "did you mean draft.ttt_length?"),
        (["+mode=colocate", "draft=eagle4"], "draft=eagle4 does not exist; choose from dflash, d"),
        (["+mode=colocate", "engine.server_args.x=1"], "use +engine.server_args.x=1"),
        (["+mode=colocate", "trainer.lr=[1"], "trainer.lr=[1 is no setting=value"),
        (["+mode=colocate", "trainer.lr=fast"], "trainer.lr: Value 'fast' of type 'str' could not"),
        (["+mode=colocate", "trainer.schedule=step"], "[cosine, linear, constant, wsd]"),
        (["+mode=colocate", "+mode=alternate"], "Multiple values for mode"),
        (["+mode=colocate", "draft.algorithm=???"], "draft.algorithm has no value"),
        (["+mode=colocate", "launch.gpus=2", "engine.tp=4", "dry_run=true"], "engine.tp to one of"),
    ],
)
def test_wrong_command_lines_end_with_one_clear_error(words, says):
    done = run_module(*words)
    assert done.returncode != 0
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_the_commands_and_the_groups():
    done = run_module("--help")
    assert done.returncode == 0, done.stderr
    for word in ("torchrun --nproc-per-node 8", "mode (+mode=...)", "experiment", "trainer:"):
        assert word in done.stdout
    for group in ("mode", "target", "draft", "data", "engine", "tracker", "experiment", "sweep"):
        line = next(line for line in done.stdout.splitlines() if line.strip().startswith(group))
        for option in options(group):
            assert option in line


def test_cfg_job_prints_the_settings():
    done = run_module("+mode=colocate", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "mode: colocate" in done.stdout

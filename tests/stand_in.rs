//! The CUDA build on a GPU that is not there: `kernels/stand_in` takes the place of the driver, cuBLAS and cuDNN. It
//! refuses what a GPU refuses, and says on standard error what is wrong.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device};
use maskinv::models::{Arch, Model, ModelConfig, save_model};

use crate::cli::{faces, str};

/// Names under which CUDA's libraries are looked for.
const NAMES: [&str; 3] = ["libcuda.so.1", "libcublas.so.13", "libcudnn.so.9"];

/// Builds the stand-in, once per process; returns its file.
fn stand_in() -> &'static Path {
    static FILE: OnceLock<PathBuf> = OnceLock::new();
    FILE.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder for the stand-in").keep();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/stand-in");
        let output = Command::new(script).arg(&folder).output().expect("a shell runs scripts/stand-in");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        folder.join("stand_in.so")
    })
}

/// A machine with these of CUDA's libraries.
struct Machine(tempfile::TempDir);

impl Machine {
    fn with(names: &[&str]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        for name in names {
            std::os::unix::fs::symlink(stand_in(), folder.path().join(name))?;
        }
        Ok(Self(folder))
    }

    /// Runs maskinv there; `settings` are the stand-in's.
    fn run(&self, settings: &str, args: &[&str]) -> Result<Output> {
        Ok(self.command(settings, args).output()?)
    }

    fn command(&self, settings: &str, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_maskinv"));
        command.args(args).env("LD_LIBRARY_PATH", self.0.path()).env("MASKINV_STAND_IN", settings);
        // Libraries of a real toolkit or of Python's packages are not meant.
        for name in ["CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "CUDA_LAUNCH_BLOCKING"] {
            command.env_remove(name);
        }
        command
    }

    /// Runs maskinv where nothing must be amiss.
    fn right(&self, args: &[&str]) -> Result<String> {
        let output = self.run("", args)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() && !said.contains("stand-in:"), "{args:?}: {said}");
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Runs maskinv where it must fail; returns what it says.
    fn wrong(&self, settings: &str, args: &[&str]) -> Result<String> {
        let output = self.run(settings, args)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success(), "{settings} {args:?}: it succeeded");
        ensure!(!said.contains("panicked"), "{said}");
        Ok(said)
    }
}

fn small_model(root: &Path) -> Result<PathBuf> {
    let config =
        ModelConfig { arch: Arch::R18, width: 0.125, embedding_size: 16, input_size: 32, ..ModelConfig::default() };
    let path = root.join("model.safetensors");
    save_model(&path, &Model::new(&config, &Device::Cpu, 1)?, DType::F32)?;
    Ok(path)
}

/// Loss of each step of an arm's `steps.jsonl`.
fn losses_of(steps: &str) -> Result<Vec<f64>> {
    let loss = |line: &str| serde_json::from_str::<serde_json::Value>(line)?["loss"].as_f64().context("a loss");
    steps.lines().map(loss).collect()
}

fn rows(csv: &str) -> Vec<Vec<f32>> {
    let numbers = |line: &str| line.split(',').skip(1).filter_map(|field| field.parse().ok()).collect();
    csv.lines().skip(1).map(numbers).collect()
}

#[test]
fn embeddings_are_those_of_the_cpu_in_every_precision() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (model, faces) = (small_model(root.path())?, faces(root.path(), 2, 2)?);
    let machine = Machine::with(&NAMES)?;
    let embed = |more: &[&str]| machine.right(&[&["embed", str(&model), str(&faces)][..], more].concat());
    let expected = rows(&embed(&["--device", "cpu"])?);
    ensure!(expected.len() == 4 && expected[0].len() == 16);
    for (precision, bound) in [("f32", 1e-5), ("tf32", 2e-3), ("f16", 2e-3), ("bf16", 2e-2)] {
        let found = rows(&embed(&["--device", "cuda", "--precision", precision])?);
        ensure!(found.len() == expected.len(), "{precision}");
        let pairs = found.iter().flatten().zip(expected.iter().flatten());
        let greatest = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        ensure!(greatest < bound, "{precision}: {greatest}");
    }
    // Convolutions by im2col and cuBLAS, where there is no cuDNN.
    let without = Machine::with(&NAMES[..2])?;
    let found = rows(&without.right(&["embed", str(&model), str(&faces), "--device", "cuda", "--precision", "f32"])?);
    let pairs = found.iter().flatten().zip(expected.iter().flatten());
    ensure!(pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) < 1e-5);
    Ok(())
}

#[test]
fn a_training_is_that_of_the_cpu() -> Result<()> {
    let root = tempfile::tempdir()?;
    let faces = faces(root.path(), 10, 4)?;
    let machine = Machine::with(&NAMES)?;
    let train = |name: &str, more: &[&str]| -> Result<Vec<f64>> {
        let out = root.path().join(name);
        let settings = ["model.width=0.125", "model.input_size=32", "train.log_every=1", "distill.lambda_lg=100"];
        let settings = settings.iter().flat_map(|setting| ["--set", *setting]);
        let args = ["train", "--data", str(&faces), "--out", str(&out), "--arm", "teacher", "--arm", "lg", "--epochs"];
        let args = args.into_iter().chain(["3", "--batch-size", "8", "-q"]).chain(settings);
        machine.right(&args.chain(more.iter().copied()).collect::<Vec<_>>())?;
        let mut losses = Vec::new();
        for arm in ["teacher", "lg"] {
            losses.extend(losses_of(&std::fs::read_to_string(out.join(arm).join("steps.jsonl"))?)?);
        }
        Ok(losses)
    };
    let cpu = train("cpu", &["--device", "cpu"])?;
    // Rounding makes two trainings of a small set drift apart: by 1e-7 at first, by some per cent after ten steps.
    for (precision, at_first, later) in [("f32", 2e-3, 0.15), ("bf16", 0.1, 0.4)] {
        let gpu = train(precision, &["--device", "cuda", "--precision", precision])?;
        ensure!(cpu.len() == gpu.len() && cpu.len() >= 12, "{cpu:?} {gpu:?}");
        for (i, (a, b)) in cpu.iter().zip(&gpu).enumerate() {
            let bound = if i % (cpu.len() / 2) < 4 { at_first } else { later };
            ensure!((a - b).abs() < bound * a.abs(), "{precision}, {i}: {cpu:?} {gpu:?}");
        }
    }
    // The default precision is that of training; the first step is the same however often figures are read.
    let default = train("default", &["--device", "cuda", "--set", "train.log_every=5"])?;
    ensure!(default.len() < cpu.len() && (default[0] - cpu[0]).abs() < 0.1 * cpu[0], "{default:?}");
    Ok(())
}

#[test]
#[ignore = "minutes: the default example"]
fn heavy_the_default_example_has_the_losses_of_the_cpu() -> Result<()> {
    const STEPS: usize = 20;
    let root = tempfile::tempdir()?;
    let machine = Machine::with(&NAMES)?;
    let losses = |device: &str| -> Result<Vec<f64>> {
        let out = root.path().join(device);
        let settings = ["--batch-size", "8", "--set", "train.log_every=1", "--precision", "f32", "-q"];
        let args = [&["train", "--device", device, "--out", str(&out)][..], &settings].concat();
        let mut training = machine.command("", &args).stdout(Stdio::null()).spawn()?;
        // Of whichever arm comes first.
        let read = || {
            let arms = std::fs::read_dir(&out).into_iter().flatten().flatten();
            arms.filter_map(|arm| std::fs::read_to_string(arm.path().join("steps.jsonl")).ok())
                .next()
                .unwrap_or_default()
        };
        while read().lines().count() < STEPS {
            ensure!(training.try_wait()?.is_none(), "{device}: it ended");
            std::thread::sleep(Duration::from_millis(200));
        }
        training.kill()?;
        training.wait()?;
        let lines = read();
        losses_of(&lines.lines().take(STEPS).collect::<Vec<_>>().join("\n"))
    };
    let (cpu, gpu) = (losses("cpu")?, losses("cuda")?);
    println!("step  CPU       stand-in");
    for (i, (cpu, gpu)) in cpu.iter().zip(&gpu).enumerate() {
        println!("{:4}  {cpu:<8.5}  {gpu:<8.5}", i + 1);
    }
    // The first steps agree to rounding; later ones drift apart, as two orders of summation do, the sooner the shorter
    // the processor's vectors are. The CPU's own losses drift as far if the learning rate is raised by a millionth: 2e-5
    // in step 5, 1e-3 in step 10.
    for (i, (cpu, gpu)) in cpu.iter().zip(&gpu).enumerate() {
        let bound = match i {
            0..3 => 1e-5,
            3..5 => 1e-3,
            _ => 0.1,
        };
        ensure!((cpu - gpu).abs() < bound * cpu, "step {}: {cpu} {gpu}", i + 1);
    }
    Ok(())
}

#[test]
fn what_a_machine_lacks_is_named_and_faults_are_errors() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (model, faces) = (small_model(root.path())?, faces(root.path(), 1, 1)?);
    let embed = |device| ["embed", str(&model), str(&faces), "--device", device];
    let machine = Machine::with(&NAMES)?;
    for (settings, device, words) in [
        ("devices=0", "cuda", "no usable CUDA driver"),
        ("capability=75", "cuda", "compute capability 7.5, expected 8.0 or newer"),
        // Between those that the build is for: their PTX is of the newest, so that yet newer ones have code.
        ("capability=110", "cuda", "no kernels for compute capability 11.0"),
        ("devices=2", "cuda:2", "no GPU 2: this machine has 2"),
        ("memory=1000000", "cuda", "OUT_OF_MEMORY"),
        ("fault=3", "cuda", "ILLEGAL_ADDRESS"),
        ("driver=12080", "cuda", "the driver is for CUDA 12.8, this build for 13.0 or newer"),
    ] {
        let said = machine.wrong(settings, &embed(device))?;
        ensure!(said.contains(words), "{settings}: {said}");
    }
    // What a search of algorithms may use at most is more than there is, and not taken to embed an image.
    for settings in ["capability=131", "capability=87", "memory=200000000"] {
        let output = machine.run(settings, &embed("cuda"))?;
        ensure!(output.status.success(), "{settings}: {}", String::from_utf8_lossy(&output.stderr));
    }
    for (names, words) in [(&NAMES[1..], "no CUDA driver"), (&NAMES[..1], "cuBLAS is missing")] {
        let said = Machine::with(names)?.wrong("", &embed("cuda"))?;
        ensure!(said.contains(words), "{names:?}: {said}");
    }
    // Libraries that lack a function, or are of another version.
    let source = root.path().join("other.c");
    std::fs::write(&source, "int cublasCreate_v2(void **handle) { return handle == 0; }")?;
    for (name, words) in [(NAMES[0], "has no function cu"), (NAMES[1], "has no function cublasDestroy_v2")] {
        let machine = Machine::with(&NAMES.into_iter().filter(|other| *other != name).collect::<Vec<_>>())?;
        let library = machine.0.path().join(name);
        let built = Command::new("cc").args(["-shared", "-o", str(&library), str(&source)]).status()?;
        ensure!(built.success());
        let said = machine.wrong("", &embed("cuda"))?;
        ensure!(said.contains(words) && said.contains(name), "{name}: {said}");
    }
    let auto = machine.run("devices=0", &embed("auto"))?;
    let said = String::from_utf8_lossy(&auto.stderr);
    ensure!(auto.status.success() && said.contains("on the CPU: no usable CUDA driver"), "{said}");
    Ok(())
}

#[test]
fn networks_that_the_engine_lacks_run_on_the_cpu_by_default() -> Result<()> {
    let root = tempfile::tempdir()?;
    let faces = faces(root.path(), 10, 4)?;
    let (out, machine) = (root.path().join("run"), Machine::with(&NAMES)?);
    let train = ["train", "--data", str(&faces), "--out", str(&out), "--arm", "teacher", "--epochs", "1", "-q"];
    let small = ["model.embedding_size=30", "model.width=0.125", "model.input_size=32", "loader.batch_size=4"];
    let small: Vec<&str> = small.into_iter().flat_map(|setting| ["--set", setting]).collect();
    let model = out.join("teacher");
    for args in [[&train[..], &small].concat(), vec!["embed", str(&model), str(&faces)]] {
        let said = machine.wrong("", &[&args[..], &["--device", "cuda"]].concat())?;
        ensure!(said.contains("multiples of 8, found 30"), "{said}");
        let output = machine.run("", &args)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{args:?}: {said}");
        ensure!(said.matches("on the CPU: ").count() == 1 && said.contains("multiples of 8, found 30"), "{said}");
    }
    Ok(())
}

#[test]
fn a_fault_is_that_of_its_kernel_when_each_is_waited_for() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (model, faces) = (small_model(root.path())?, faces(root.path(), 1, 1)?);
    let machine = Machine::with(&NAMES)?;
    let embed = ["embed", str(&model), str(&faces), "--device", "cuda"];
    let output = machine.command("fault=5", &embed).env("CUDA_LAUNCH_BLOCKING", "1").output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    // The stand-in says which kernel that was.
    let kernel = said
        .lines()
        .find_map(|line| line.strip_prefix("stand-in: ")?.strip_suffix(": an illegal address, as the test wants it"));
    let kernel = kernel.with_context(|| said.clone().into_owned())?;
    let error = said.lines().filter(|line| !line.starts_with("stand-in: ")).collect::<Vec<_>>().join("\n");
    ensure!(!output.status.success() && error.contains(&format!("{kernel}: ")), "{said}");
    ensure!(!error.contains("CUDA_LAUNCH_BLOCKING"), "{said}");
    let said = machine.wrong("fault=5", &embed)?;
    ensure!(said.contains("ILLEGAL_ADDRESS") && said.contains("CUDA_LAUNCH_BLOCKING=1 tells"), "{said}");
    Ok(())
}

#[test]
fn any_allocation_may_fail() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (model, faces) = (small_model(root.path())?, faces(root.path(), 1, 1)?);
    let machine = Machine::with(&NAMES)?;
    let embed = ["embed", str(&model), str(&faces), "--device", "cuda"];
    let count = machine.run("counts=1", &embed)?;
    let said = String::from_utf8_lossy(&count.stderr);
    let num = said.split(" launches, ").nth(1).and_then(|rest| rest.split(' ').next());
    let num: usize = num.with_context(|| said.clone().into_owned())?.parse()?;
    ensure!(num > 10, "{said}");
    for number in 1..=num {
        // Where a smaller workspace or a pool is the way out, it succeeds.
        let output = machine.run(&format!("oom={number}"), &embed)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() || said.contains("OUT_OF_MEMORY"), "{number}: {said}");
        ensure!(!said.contains("panicked") && !said.contains("stand-in:"), "{number}: {said}");
    }
    Ok(())
}

#[test]
fn libraries_of_other_versions_are_used_or_left_aside() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (model, faces) = (small_model(root.path())?, faces(root.path(), 1, 2)?);
    let embed = ["embed", str(&model), str(&faces), "--device", "cuda", "--precision", "f32"];
    let expected = Machine::with(&NAMES)?.right(&embed)?;
    ensure!(Machine::with(&[NAMES[0], "libcublas.so.12", NAMES[2]])?.right(&embed)? == expected);
    for (names, settings, why) in [
        (&NAMES[..], "cudnn=80907", "expected version 9 of cuDNN, found 80907"),
        (&NAMES[..2], "", "no cuDNN 9 on this machine"),
    ] {
        let output = Machine::with(names)?.run(settings, &embed)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() && said.matches("cuBLAS computes convolutions").count() == 1, "{said}");
        ensure!(said.contains(why), "{said}");
    }
    // A way that the search offered and the call refuses gives place to the next.
    let output = Machine::with(&NAMES)?.run("unsupported=1", &embed)?;
    ensure!(output.status.success() && rows(&String::from_utf8(output.stdout)?).len() == 2);
    Ok(())
}

#[test]
fn convolutions_without_an_algorithm_are_said_once() -> Result<()> {
    let root = tempfile::tempdir()?;
    let (model, faces) = (small_model(root.path())?, faces(root.path(), 10, 4)?);
    let (out, machine) = (root.path().join("run"), Machine::with(&NAMES)?);
    let train = ["train", "--data", str(&faces), "--out", str(&out), "--arm", "teacher", "--epochs", "2"];
    let small = ["--batch-size", "4", "--set", "model.width=0.125", "--set", "model.input_size=32", "-q"];
    for args in [&["embed", str(&model), str(&faces)][..], &[&train[..], &small].concat()] {
        let output = machine.run("ways=0", &[args, &["--device", "cuda"]].concat())?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() && !said.contains("stand-in:"), "{said}");
        ensure!(said.contains("cuDNN has no algorithm for output of"), "{said}");
        // Also of the evaluation after the training, with other batches: never again for the same convolution.
        ensure!(said.matches("cuDNN has no algorithm").count() <= 2, "{said}");
    }
    Ok(())
}

#[test]
fn plans_are_shown() -> Result<()> {
    let root = tempfile::tempdir()?;
    let model = small_model(root.path())?;
    let machine = Machine::with(&NAMES)?;
    let shown = machine.right(&["info", str(&model), "--device", "cuda", "--batch-size", "4"])?;
    for words in ["stand-in GPU", "9.1.0", "4 x 32 x 32 x 4 to 8, 3 x 3", "gradient of the filters", "tensor cores"] {
        ensure!(shown.contains(words), "{words}: {shown}");
    }
    let json = machine.right(&[
        "info",
        str(&model),
        "--device",
        "cuda",
        "--precision",
        "f32",
        "--batch-size",
        "2",
        "--json",
    ])?;
    let json: serde_json::Value = serde_json::from_str(&json)?;
    let passes = json["models"][0]["convolutions"].as_array().context("convolutions")?;
    ensure!(passes.len() > 20 && passes.iter().all(|pass| pass["milliseconds"].is_number()), "{json}");
    // Exact f32 runs without tensor cores, which round its factors.
    ensure!(passes.iter().all(|pass| pass["algorithm"].as_str().is_some_and(|a| a.ends_with("FMA"))), "{json}");
    Ok(())
}

#[test]
fn copies_use_the_same_page_locked_memory_again() -> Result<()> {
    let root = tempfile::tempdir()?;
    let faces = faces(root.path(), 10, 4)?;
    let machine = Machine::with(&NAMES)?;
    // Returns what was said of page-locked memory, and the losses.
    let train = |epochs: &str, lag: usize| -> Result<(String, Vec<f64>)> {
        let out = root.path().join(format!("{epochs}-{lag}"));
        let args = ["train", "--data", str(&faces), "--out", str(&out), "--arm", "teacher", "--epochs", epochs, "-q"];
        let more = ["--device", "cuda", "--batch-size", "8", "--set", "model.width=0.125", "--set"];
        let args = [&args[..], &more, &["model.input_size=32", "--set", "train.log_every=6"]].concat();
        let output = machine.run(&format!("counts=1,lag={lag}"), &args)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success() && !said.contains("stand-in:"), "{said}");
        let counts = said.lines().find_map(|line| line.strip_prefix("stand-in counts: ")).context("counts")?;
        let steps = std::fs::read_to_string(out.join("teacher/steps.jsonl"))?;
        Ok((counts.split(" allocations, ").nth(1).context("of pinned memory")?.to_owned(), losses_of(&steps)?))
    };
    let ((few, _), (many, late)) = (train("2", 2000)?, train("8", 2000)?);
    ensure!(few == many, "{few}, with more steps {many}");
    // Memory that a copy still reads is not written: however late the GPU is, it gets the same.
    let (_, at_once) = train("8", 0)?;
    ensure!(late.len() > 4 && late == at_once, "{late:?}, without delay {at_once:?}");
    // Weights of more bytes than there is page-locked memory are copied piece by piece.
    let config = ModelConfig { arch: Arch::R18, input_size: 112, ..ModelConfig::default() };
    let path = root.path().join("large.safetensors");
    save_model(&path, &Model::new(&config, &Device::Cpu, 1)?, DType::F32)?;
    let info = machine.run("pinned=70000000", &["info", str(&path), "--device", "cuda", "--batch-size", "1"])?;
    ensure!(info.status.success(), "{}", String::from_utf8_lossy(&info.stderr));
    Ok(())
}

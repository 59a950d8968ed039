//! The maskinv worker of `benches/peers/gpu_torch.py`: `gpu_worker infer ARCH BATCH | train ARCH BATCH CLASSES | kd
//! ARCH BATCH CLASSES | margin N CLASSES D [--precision bf16] [--gpu 0] [--steps 20]`. It speaks the protocol of
//! `cpu_worker.py`; its peak is the GPU's memory, and figures are read every so many steps. These print a table and
//! exit: `kernels [MB]`, on arrays of that size; `plans ARCH BATCH`, how each convolution runs; `profile WORKLOAD`,
//! its time by kernel; `suite ARCH BATCH CLASSES [--json FILE]`, the median times of all workloads. `dry WORKLOAD`
//! needs no GPU and computes nothing: it prints the workload's memory, kernel launches and library calls, and FLOP; its
//! workload may also be `preset NAME ARM TEACHER CLASSES`, the steps of a preset with a teacher of that architecture.

use std::io::{BufRead, Write};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use candle_core::Device;
use maskinv::data::{Batch, Pixels};
use maskinv::losses::{DistillConfig, MarginConfig, MarginHead};
use maskinv::machine::bench::{Margin, kernels, profile};
use maskinv::machine::dry::dry;
use maskinv::machine::{Choice, Machine, Precision};
use maskinv::models::{Arch, ConvolutionPass, Model, ModelConfig};
use maskinv::train::{BatchNormMode, StepConfig, Trainer, preset};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// Minimum duration of a sample in seconds.
const SAMPLE_S: f64 = 1.0;
const SIDE: usize = 112;

/// Workload that runs some iterations, waits for the last one, and returns their number.
type Work<'a> = Box<dyn FnMut() -> Result<u32> + 'a>;

fn main() -> Result<()> {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let precision: Precision = option(&mut args, "--precision", "bf16")?;
    let number: usize = option(&mut args, "--gpu", "0")?;
    let steps: usize = option(&mut args, "--steps", "20")?;
    let json: String = option(&mut args, "--json", "")?;
    let json = (!json.is_empty()).then_some(json);
    let (command, rest) = args.split_first().context("expected a workload")?;
    if command == "dry" {
        return run_dry(precision, rest, steps);
    }
    let machine = Machine::open(Choice::Cuda(number), precision)?;
    match command.as_str() {
        "kernels" => {
            let megabytes = rest.first().map_or(Ok(256), |number| number.parse())?;
            print(&machine.to_string())?;
            kernels(&machine, megabytes << 20)?.iter().try_for_each(|line| print(line))
        }
        "plans" => plans(&machine, rest),
        "profile" => {
            let (lines, num) = with_work(&machine, rest, steps, |work| {
                work()?;
                let mut num = 0;
                let lines = profile(&machine, || {
                    num = work().map_err(|error| maskinv::Error::Training(format!("{error:#}")))?;
                    Ok(())
                })?;
                Ok((lines, num))
            })?;
            print(&format!("{machine}: {}, {num} iterations", rest.join(" ")))?;
            lines.iter().try_for_each(|line| print(line))
        }
        "suite" => suite(&machine, rest, steps, json.as_deref()),
        _ => with_work(&machine, &args, steps, |work| serve(&machine, work)),
    }
}

fn print(line: &str) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{line}")?)
}

fn run_dry(precision: Precision, args: &[String], steps: usize) -> Result<()> {
    let (machine, calls) = dry(precision);
    with_work(&machine, args, steps, |work| {
        work()?;
        let (calls_before, flops_before) = (calls.num(), calls.flops());
        let num = f64::from(work()?);
        let bytes = machine.gpu_bytes().context("a GPU")?;
        let (calls, flops) = ((calls.num() - calls_before) as f64, (calls.flops() - flops_before) as f64);
        print(&format!(
            "{:.0} MB without the libraries' workspaces; an iteration has {:.0} calls and {:.3} TFLOP",
            bytes as f64 / 1e6,
            calls / num,
            flops / num / 1e12
        ))
    })
}

/// Takes a sample for each line on standard input.
fn serve(machine: &Machine, work: &mut Work<'_>) -> Result<()> {
    work()?;
    print("ready")?;
    for line in std::io::stdin().lock().lines() {
        line?;
        let (began, mut num) = (Instant::now(), 0);
        while num == 0 || began.elapsed().as_secs_f64() < SAMPLE_S {
            num += work()?;
        }
        print(&format!("{} 0", began.elapsed().as_secs_f64() / f64::from(num)))?;
        std::io::stdout().flush()?;
    }
    print(&format!("peak {}", machine.gpu_bytes().context("a GPU is open")?))
}

fn plans(machine: &Machine, args: &[String]) -> Result<()> {
    let batch = size(args, 1)?;
    print(&format!("{machine}: convolutions of {} with {batch} images", args[0]))?;
    print(&ConvolutionPass::heads())?;
    let rows = model(machine, arch(&args[0])?, 0)?.convolutions(batch)?;
    rows.iter().try_for_each(|row| print(&row.to_string()))
}

/// Prints the median time of each workload, and writes them to a file after each.
fn suite(machine: &Machine, args: &[String], steps: usize, json: Option<&str>) -> Result<()> {
    let [arch, batch, classes] = args else { bail!("suite: expected ARCH BATCH CLASSES") };
    let rows = 4 * batch.parse::<usize>()?;
    let works = [
        format!("kd {arch} {batch} {classes}"),
        format!("infer {arch} {batch}"),
        format!("train {arch} {batch} {classes}"),
        format!("margin {rows} {classes} 512"),
        format!("infer {arch} 1"),
    ];
    print(&machine.to_string())?;
    let mut record = serde_json::Map::new();
    for name in works {
        let words: Vec<String> = name.split(' ').map(str::to_owned).collect();
        let median = with_work(machine, &words, steps, |work| {
            work()?;
            let (began, mut samples) = (Instant::now(), Vec::new());
            while samples.len() < 3 || (samples.len() < 50 && began.elapsed().as_secs_f64() < 6.0) {
                let start = Instant::now();
                let num = work()?;
                samples.push(1e3 * start.elapsed().as_secs_f64() / f64::from(num));
            }
            samples.sort_by(f64::total_cmp);
            Ok(samples[samples.len() / 2])
        })?;
        let bytes = machine.gpu_bytes().context("a GPU is open")?;
        print(&format!("{name:28}  {median:>10.3} ms, {:.0} MB held so far", bytes as f64 / 1e6))?;
        record.insert(name, serde_json::json!({ "median_ms": median, "peak_bytes": bytes }));
        if let Some(path) = json {
            std::fs::write(path, serde_json::to_string_pretty(&record)?)?;
        }
    }
    Ok(())
}

/// Builds a workload, hands it to `run` and returns what that returns; figures are read every `steps` iterations.
fn with_work<T>(
    machine: &Machine,
    args: &[String],
    steps: usize,
    run: impl FnOnce(&mut Work<'_>) -> Result<T>,
) -> Result<T> {
    let network = || arch(args.get(1).context("too few arguments")?);
    match args.first().map(String::as_str) {
        Some("infer") => run(&mut infer(machine, network()?, size(args, 2)?)?),
        Some(kind @ ("train" | "kd")) => {
            let teacher = (kind == "kd").then(|| frozen(machine, network()?, 5)).transpose()?;
            let lambda = if teacher.is_some() { 3000.0 } else { 0.0 };
            let distill = DistillConfig { lambda, ..DistillConfig::default() };
            let config = StepConfig { distill, log_every: steps, ..StepConfig::default() };
            let student = model(machine, network()?, 0)?;
            run(&mut train(student, (size(args, 2)?, size(args, 3)?), teacher.as_ref(), &config)?)
        }
        Some("preset") => {
            let [_, name, arm, teacher, classes] = args else { bail!("preset: expected NAME ARM TEACHER CLASSES") };
            let config = preset(name)?;
            let arm = config.train.arms.iter().find(|of| of.name() == *arm).context("the preset has no such arm")?;
            let teacher = frozen(machine, arch(teacher)?, 5)?;
            let mut student = Model::new(&config.model, &Device::Cpu, 0)?;
            student.freeze(&config.train.freeze)?;
            student.params().freeze_statistics(config.train.batch_norm == BatchNormMode::Frozen);
            let step = StepConfig { log_every: steps, ..config.step(*arm) };
            let sizes = (config.loader.batch_size, classes.parse()?);
            run(&mut train(student.on(machine), sizes, Some(&teacher), &step)?)
        }
        Some("margin") => {
            let margin = Margin::new(machine, size(args, 1)?, size(args, 2)?, size(args, 3)?)?;
            let mut work: Work = Box::new(move || {
                (1..=steps).try_for_each(|i| margin.step(i == steps))?;
                Ok(steps as u32)
            });
            run(&mut work)
        }
        _ => bail!("expected infer, train, kd, preset, margin, kernels, plans, profile, suite or dry"),
    }
}

fn size(args: &[String], at: usize) -> Result<usize> {
    Ok(args.get(at).context("too few arguments")?.parse()?)
}

/// Removes `NAME VALUE` from the arguments and returns the parsed value, or else the default.
fn option<T: std::str::FromStr>(args: &mut Vec<String>, name: &str, default: &str) -> Result<T> {
    let value = match args.iter().position(|arg| arg == name) {
        Some(at) => args.drain(at..(at + 2).min(args.len())).next_back().unwrap_or_default(),
        None => default.to_owned(),
    };
    value.parse().ok().with_context(|| format!("{name}: found {value:?}"))
}

fn arch(name: &str) -> Result<Arch> {
    Arch::ALL.into_iter().find(|arch| arch.name() == name).with_context(|| format!("unknown network {name}"))
}

fn model(machine: &Machine, arch: Arch, seed: u64) -> Result<Model> {
    Ok(Model::new(&ModelConfig { arch, ..ModelConfig::default() }, &Device::Cpu, seed)?.on(machine))
}

/// Returns a frozen model, as used for teachers and inference.
fn frozen(machine: &Machine, arch: Arch, seed: u64) -> Result<Model> {
    let model = model(machine, arch, seed)?;
    Ok(Model::frozen(model.config(), model.params().state()?, &Device::Cpu)?.on(machine))
}

fn pixels(batch: usize, rng: &mut ChaCha8Rng) -> Pixels {
    let mut pixels = Pixels { values: vec![0; batch * SIDE * SIDE * 3], num_images: batch, size: SIDE };
    rng.fill(pixels.values.as_mut_slice());
    pixels
}

fn infer(machine: &Machine, arch: Arch, batch: usize) -> Result<Work<'static>> {
    let network = frozen(machine, arch, 0)?.into_inference(batch)?;
    let images = pixels(batch, &mut ChaCha8Rng::seed_from_u64(1));
    Ok(Box::new(move || {
        network.run_pixels(&images)?;
        Ok(1)
    }))
}

/// Returns a workload of training steps; each call ends with a step whose report is read back from the GPU.
fn train<'a>(
    student: Model,
    (batch, classes): (usize, usize),
    teacher: Option<&'a Model>,
    config: &StepConfig,
) -> Result<Work<'a>> {
    let head = MarginHead::new(&MarginConfig::default(), 512, classes, &Device::Cpu, 1)?;
    let mut trainer = Trainer::new(student, head, teacher, config)?;
    let (mut rng, mut step) = (ChaCha8Rng::seed_from_u64(0), 0);
    let images = pixels(batch, &mut rng);
    Ok(Box::new(move || {
        let first = step;
        loop {
            let labels: Vec<i64> = (0..batch).map(|_| rng.random_range(0..classes as i64)).collect();
            let batch = Batch {
                teacher: images.clone(),
                student: images.clone(),
                covered: vec![0.0; labels.len()],
                mirrored: Vec::new(),
                labels,
                images: Vec::new(),
            };
            let report = trainer.step(batch, step, 0.01)?;
            step += 1;
            if let Some(report) = report {
                ensure!(report.loss.is_finite(), "the loss is not finite");
                return Ok((step - first) as u32);
            }
        }
    }))
}

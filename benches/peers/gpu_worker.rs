//! The maskinv worker of `benches/peers/gpu_torch.py`: `gpu_worker infer ARCH BATCH | train ARCH BATCH CLASSES | kd
//! ARCH BATCH CLASSES | margin N CLASSES D | kernels [--precision bf16] [--gpu 0]`. It speaks the protocol of
//! `cpu_worker.py`; its peak is the GPU's memory. These print a table and exit: `kernels`; `plans ARCH BATCH`, how each
//! convolution runs; `profile WORKLOAD`, its time by kernel; `suite ARCH BATCH CLASSES [--json FILE]`, the median times of
//! all workloads. `dry WORKLOAD` needs no GPU and computes nothing: it prints the workload's memory, kernel launches and
//! library calls, and FLOP.

use std::io::{BufRead, Write};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use candle_core::Device;
use maskinv::data::{Batch, Pixels};
use maskinv::losses::{DistillConfig, MarginConfig, MarginHead};
use maskinv::machine::bench::{Margin, kernels, profile};
use maskinv::machine::dry::dry;
use maskinv::machine::{Choice, Machine, Precision};
use maskinv::models::{Arch, ConvolutionPass, Inference, Model, ModelConfig};
use maskinv::train::{StepConfig, Trainer};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// Minimum duration of a sample in seconds.
const SAMPLE_S: f64 = 1.0;
const SIDE: usize = 112;

/// Workload that runs some iterations, waits for the last one, and returns their number.
type Work = Box<dyn FnMut() -> Result<u32>>;

fn main() -> Result<()> {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let precision: Precision = option(&mut args, "--precision", "bf16")?;
    let number: usize = option(&mut args, "--gpu", "0")?;
    let json: String = option(&mut args, "--json", "")?;
    let json = (!json.is_empty()).then_some(json);
    if args.first().is_some_and(|arg| arg == "dry") {
        args.remove(0);
        let (machine, calls) = dry(precision);
        let mut work = work(&machine, &args)?;
        work()?;
        let (calls_before, flops_before) = (calls.num(), calls.flops());
        let num = f64::from(work()?);
        let bytes = machine.gpu_bytes().context("a GPU")?;
        let (calls, flops) = ((calls.num() - calls_before) as f64, (calls.flops() - flops_before) as f64);
        println!(
            "{:.0} MB without the libraries' workspaces; an iteration has {:.0} calls and {:.3} TFLOP",
            bytes as f64 / 1e6,
            calls / num,
            flops / num / 1e12
        );
        return Ok(());
    }
    let machine = Machine::open(Choice::Cuda(number), precision)?;
    if args.first().is_some_and(|arg| arg == "kernels") {
        println!("{machine}");
        return kernels(&machine)?.iter().try_for_each(|line| Ok(writeln!(std::io::stdout(), "{line}")?));
    }
    match args.first().map(String::as_str) {
        Some("plans") => return plans(&machine, &args),
        Some("profile") => {
            args.remove(0);
            let mut work = work(&machine, &args)?;
            work()?;
            let mut num = 0;
            let lines = profile(&machine, || {
                num = work().map_err(|error| maskinv::Error::Training(format!("{error:#}")))?;
                Ok(())
            })?;
            println!("{machine}: {}, {num} iterations", args.join(" "));
            return lines.iter().try_for_each(|line| Ok(writeln!(std::io::stdout(), "{line}")?));
        }
        Some("suite") => return suite(&machine, &args, json.as_deref()),
        _ => {}
    }
    let mut work = work(&machine, &args)?;
    work()?;
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        line?;
        let (began, mut num) = (Instant::now(), 0);
        while num == 0 || began.elapsed().as_secs_f64() < SAMPLE_S {
            num += work()?;
        }
        println!("{} 0", began.elapsed().as_secs_f64() / f64::from(num));
        std::io::stdout().flush()?;
    }
    println!("peak {}", machine.gpu_bytes().context("a GPU is open")?);
    Ok(())
}

fn plans(machine: &Machine, args: &[String]) -> Result<()> {
    let batch: usize = args.get(2).context("too few arguments")?.parse()?;
    println!("{machine}: convolutions of {} with {batch} images", args[1]);
    println!("{}", ConvolutionPass::heads());
    let rows = model(machine, arch(args)?, 0)?.convolutions(batch)?;
    rows.iter().try_for_each(|row| Ok(writeln!(std::io::stdout(), "{row}")?))
}

/// Prints the median time of each workload, and writes them to a file after each.
fn suite(machine: &Machine, args: &[String], json: Option<&str>) -> Result<()> {
    let [_, arch, batch, classes] = args else { bail!("suite: expected ARCH BATCH CLASSES") };
    let rows = 4 * batch.parse::<usize>()?;
    let works = [
        format!("kd {arch} {batch} {classes}"),
        format!("infer {arch} {batch}"),
        format!("train {arch} {batch} {classes}"),
        format!("margin {rows} {classes} 512"),
        format!("infer {arch} 1"),
    ];
    println!("{machine}");
    let mut record = serde_json::Map::new();
    for name in works {
        let words: Vec<String> = name.split(' ').map(str::to_owned).collect();
        let mut work = work(machine, &words)?;
        work()?;
        let (began, mut samples) = (Instant::now(), Vec::new());
        while samples.len() < 3 || (samples.len() < 50 && began.elapsed().as_secs_f64() < 6.0) {
            let start = Instant::now();
            let num = work()?;
            samples.push(1e3 * start.elapsed().as_secs_f64() / f64::from(num));
        }
        samples.sort_by(f64::total_cmp);
        let (median, bytes) = (samples[samples.len() / 2], machine.gpu_bytes().context("a GPU is open")?);
        writeln!(std::io::stdout(), "{name:28}  {median:>10.3} ms, {:.0} MB held so far", bytes as f64 / 1e6)?;
        record.insert(name, serde_json::json!({ "median_ms": median, "peak_bytes": bytes }));
        if let Some(path) = json {
            std::fs::write(path, serde_json::to_string_pretty(&record)?)?;
        }
    }
    Ok(())
}

fn work(machine: &Machine, args: &[String]) -> Result<Work> {
    let size = |i: usize| -> Result<usize> { Ok(args.get(i).context("too few arguments")?.parse()?) };
    match args.first().map(String::as_str) {
        Some("infer") => infer(machine, arch(args)?, size(2)?),
        Some("train") => train(machine, arch(args)?, size(2)?, size(3)?, 0.0),
        Some("kd") => train(machine, arch(args)?, size(2)?, size(3)?, 3000.0),
        Some("margin") => {
            let margin = Margin::new(machine, size(1)?, size(2)?, size(3)?)?;
            Ok(Box::new(move || {
                (1..=20).try_for_each(|i| margin.step(i == 20))?;
                Ok(20)
            }))
        }
        _ => bail!("expected infer, train, kd, margin, kernels, plans, profile, suite or dry"),
    }
}

/// Removes `NAME VALUE` from the arguments and returns the parsed value, or else the default.
fn option<T: std::str::FromStr>(args: &mut Vec<String>, name: &str, default: &str) -> Result<T> {
    let value = match args.iter().position(|arg| arg == name) {
        Some(at) => args.drain(at..(at + 2).min(args.len())).next_back().unwrap_or_default(),
        None => default.to_owned(),
    };
    value.parse().ok().with_context(|| format!("{name}: found {value:?}"))
}

fn arch(args: &[String]) -> Result<Arch> {
    let name = args.get(1).context("too few arguments")?;
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

fn infer(machine: &Machine, arch: Arch, batch: usize) -> Result<Work> {
    let network = frozen(machine, arch, 0)?.into_inference(batch)?;
    let images = pixels(batch, &mut ChaCha8Rng::seed_from_u64(1));
    Ok(Box::new(move || {
        let Inference::Gpu(network) = &network else { bail!("not on the GPU") };
        network.run_rgb(&images.values)?;
        Ok(1)
    }))
}

/// Returns a workload of training steps; each call ends with a step whose report is read back from the GPU.
fn train(machine: &Machine, arch: Arch, batch: usize, classes: usize, lambda: f64) -> Result<Work> {
    // Leaked, because the trainer borrows it for as long as the process lives.
    let teacher: &'static Model = Box::leak(Box::new(frozen(machine, arch, 5)?));
    let head = MarginHead::new(&MarginConfig::default(), 512, classes, &Device::Cpu, 1)?;
    let distill = DistillConfig { lambda, ..DistillConfig::default() };
    let student = model(machine, arch, 0)?;
    let config = StepConfig { distill, ..StepConfig::default() };
    let mut trainer = Trainer::new(student, head, Some(teacher), &config)?;
    let (mut rng, mut step) = (ChaCha8Rng::seed_from_u64(0), 0);
    let images = pixels(batch, &mut rng);
    Ok(Box::new(move || {
        let first = step;
        loop {
            let labels = (0..batch).map(|_| rng.random_range(0..classes as i64)).collect();
            let batch = Batch { teacher: images.clone(), student: images.clone(), labels, images: Vec::new() };
            let report = trainer.step(batch, step, 0.01)?;
            step += 1;
            if let Some(report) = report {
                ensure!(report.loss.is_finite(), "the loss is not finite");
                return Ok((step - first) as u32);
            }
        }
    }))
}

//! The maskinv worker of `benches/peers/cpu.py`: `worker infer ARCH BATCH | int8 ARCH BATCH | train ARCH BATCH CLASSES
//! [--recompute] | margin N CLASSES D | detect DATA | photo DATA [--threads N] [--vectors KIND]`. Prints `ready`, then the wall and CPU
//! seconds of an iteration for each line on stdin, and at the end its peak memory. With `--profile ROUNDS`, it times that
//! many iterations instead and exits.

use std::io::{BufRead, Write};
use std::path::Path;
use std::str::FromStr;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor};
use image::imageops::{FilterType, resize};
use maskinv::data::{Batch, Pixels, align_face, decode_image, read_image};
use maskinv::face::{DetectConfig, Detector, Face};
use maskinv::losses::{MarginConfig, MarginHead};
use maskinv::machine::peak_bytes;
use maskinv::models::{Arch, Model, ModelConfig, QuantiseConfig, load_model};
use maskinv::ops::margin_loss::{Rows, margin_loss_with_gradients};
use maskinv::train::{StepConfig, Trainer};
use maskinv::vectors::{self, Vectors};
use maskinv::workers;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// Minimum duration of a sample in seconds.
const SAMPLE_S: f64 = 0.1;

fn main() -> Result<()> {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let threads = option(&mut args, "--threads")?.unwrap_or(2);
    let rounds = option(&mut args, "--profile")?;
    if let Some(name) = option::<String>(&mut args, "--vectors")? {
        let kind = Vectors::ALL.into_iter().find(|kind| kind.name() == name);
        vectors::limit(kind.with_context(|| format!("unknown vectors {name}"))?)?;
    }
    let recomputes = args.iter().position(|arg| arg == "--recompute").map(|at| args.remove(at)).is_some();
    workers::pool(threads).build_global()?;
    let number = |i: usize| -> Result<usize> { Ok(args.get(i).context("too few arguments")?.parse()?) };
    let mut step: Box<dyn FnMut() -> Result<()>> = match args.first().map(String::as_str) {
        Some("infer") => infer(Model::new(&network(&args[1])?, &Device::Cpu, 0)?, number(2)?)?,
        Some("int8") => infer(quantised(&network(&args[1])?)?, number(2)?)?,
        Some("train") => train(network(&args[1])?, number(2)?, number(3)?, recomputes)?,
        Some("margin") => margin(number(1)?, number(2)?, number(3)?)?,
        Some("detect") => detect(Path::new(args.get(1).context("detect DATA")?))?,
        Some("photo") => photo(Path::new(args.get(1).context("photo DATA")?))?,
        _ => bail!("expected infer, int8, train, margin, detect or photo"),
    };
    for _ in 0..3 {
        step()?;
    }
    if let Some(rounds) = rounds {
        let mut times = Vec::new();
        for _ in 0..rounds {
            let began = Instant::now();
            step()?;
            times.push(1e3 * began.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        println!("median {:.2} ms, least {:.2} ms, peak {:.0} MB", times[rounds / 2], times[0], peak()? as f64 / 1e6);
        return Ok(());
    }
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        line?;
        let (began, cpu, mut num) = (Instant::now(), cpu_s()?, 0);
        while num == 0 || began.elapsed().as_secs_f64() < SAMPLE_S {
            step()?;
            num += 1;
        }
        println!("{} {}", began.elapsed().as_secs_f64() / f64::from(num), (cpu_s()? - cpu) / f64::from(num));
        std::io::stdout().flush()?;
    }
    println!("peak {}", peak()?);
    Ok(())
}

/// Removes `NAME VALUE` from the arguments and returns the value, if it is there.
fn option<T: FromStr<Err: std::error::Error + Send + Sync + 'static>>(
    args: &mut Vec<String>,
    name: &str,
) -> Result<Option<T>> {
    let Some(at) = args.iter().position(|arg| arg == name) else { return Ok(None) };
    let value = args.get(at + 1).with_context(|| format!("{name} needs a value"))?.parse()?;
    args.drain(at..at + 2);
    Ok(Some(value))
}

/// Returns the network of a name such as `r50`; `r50-se` has squeeze-excitation.
fn network(name: &str) -> Result<ModelConfig> {
    let (plain, squeeze_excitation) = name.strip_suffix("-se").map_or((name, false), |plain| (plain, true));
    let arch = Arch::ALL.into_iter().find(|arch| arch.name() == plain);
    let arch = arch.with_context(|| format!("unknown network {name}"))?;
    Ok(ModelConfig { arch, squeeze_excitation, ..ModelConfig::default() })
}

fn images(batch: usize) -> Result<Tensor> {
    Ok(Tensor::rand(-1f32, 1.0, (batch, 3, 112, 112), &Device::Cpu)?)
}

/// Returns a network quantised on a few random images.
fn quantised(config: &ModelConfig) -> Result<Model> {
    let mut values = vec![0; 4 * 112 * 112 * 3];
    ChaCha8Rng::seed_from_u64(1).fill(values.as_mut_slice());
    let pixels = Pixels { values, num_images: 4, size: 112 };
    Ok(Model::new(config, &Device::Cpu, 0)?.quantise(1, &QuantiseConfig::default(), |_| Ok(pixels.clone()))?)
}

fn infer(model: Model, batch: usize) -> Result<Box<dyn FnMut() -> Result<()>>> {
    let network = model.into_inference(batch)?;
    let x = images(batch)?;
    Ok(Box::new(move || {
        network.run(&x)?;
        Ok(())
    }))
}

fn train(config: ModelConfig, batch: usize, classes: usize, recompute: bool) -> Result<Box<dyn FnMut() -> Result<()>>> {
    let model = Model::new(&config, &Device::Cpu, 0)?;
    let head = MarginHead::new(&MarginConfig::default(), 512, classes, &Device::Cpu, 1)?;
    let mut trainer = Trainer::new(model, head, None, &StepConfig { recompute, ..StepConfig::default() })?;
    let (mut rng, mut step) = (ChaCha8Rng::seed_from_u64(0), 0);
    let mut pixels = Pixels { values: vec![0; batch * 112 * 112 * 3], num_images: batch, size: 112 };
    rng.fill(pixels.values.as_mut_slice());
    Ok(Box::new(move || {
        // Drawn anew for each step, as in the peers: a memorised batch has gradients so small that they are denormal.
        let labels: Vec<i64> = (0..batch).map(|_| rng.random_range(0..classes as i64)).collect();
        let batch = Batch {
            teacher: Pixels::default(),
            student: pixels.clone(),
            covered: vec![0.0; labels.len()],
            mirrored: Vec::new(),
            labels,
            images: Vec::new(),
        };
        let report = trainer.step(batch, step, 0.01)?.context("the CPU knows the figures of each step")?;
        step += 1;
        anyhow::ensure!(report.loss.is_finite(), "the loss is not finite");
        Ok(())
    }))
}

fn margin(n: usize, classes: usize, d: usize) -> Result<Box<dyn FnMut() -> Result<()>>> {
    let config = MarginConfig::default();
    let head = MarginHead::new(&config, d, classes, &Device::Cpu, 1)?;
    let centres: Vec<f32> = head.params().state()?["kernel"].flatten_all()?.to_vec1()?;
    drop(head);
    let mut gradient = vec![0.0; centres.len()];
    let embeddings: Vec<f32> = Tensor::randn(0f32, 1.0, n * d, &Device::Cpu)?.to_vec1()?;
    let labels: Vec<i64> = (0..n as i64).map(|i| i * 37 % classes as i64).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    Ok(Box::new(move || {
        let margins = config.draw(n, &mut rng);
        let rows = Rows { labels: &labels, margins: &margins };
        margin_loss_with_gradients(&embeddings, &centres, rows, config.op(), 1.0, &mut gradient)?;
        Ok(())
    }))
}

/// Settings of one search of a photo at 640 pixels.
fn once() -> DetectConfig {
    DetectConfig { longer_side: Some(640), ..DetectConfig::AS_IT_IS }
}

fn detector(data: &Path) -> Result<Detector> {
    Ok(Detector::open(&data.join("models/face_detection_yunet_2023mar.onnx"))?)
}

/// Faces in a photo of 640x640 pixels.
fn detect(data: &Path) -> Result<Box<dyn FnMut() -> Result<()>>> {
    let (detector, photo) = (detector(data)?, read_image(&data.join("raw_photos/selfie-many-people.jpg"))?);
    let photo = resize(&photo, 640, 640, FilterType::Triangle);
    Ok(Box::new(move || {
        anyhow::ensure!(!detector.detect(&photo, &once())?.is_empty(), "no face");
        Ok(())
    }))
}

/// From the bytes of a JPEG to the embedding of its largest face.
fn photo(data: &Path) -> Result<Box<dyn FnMut() -> Result<()>>> {
    let (detector, bytes) = (detector(data)?, std::fs::read(data.join("raw_photos/insightface_t1.jpg"))?);
    let network = load_model(&data.join("models/w600k_mbf.onnx"), None)?.model.into_inference(2)?;
    let area = |face: &Face| (face.bounds[2] - face.bounds[0]) * (face.bounds[3] - face.bounds[1]);
    Ok(Box::new(move || {
        let photo = decode_image(&bytes, || "photo.jpg".into())?;
        let faces = detector.detect(&photo, &once())?;
        let face = faces.iter().max_by(|a, b| area(a).total_cmp(&area(b))).context("no face")?;
        let crop = align_face(&photo, face.points()?)?;
        let mut pixels = Pixels::new(112);
        pixels.push(&crop);
        pixels.push_flipped(&crop, true);
        network.run_pixels(&pixels)?;
        Ok(())
    }))
}

/// Returns the CPU time of all threads in seconds.
fn cpu_s() -> Result<f64> {
    let mut total_ns = 0.0;
    for task in std::fs::read_dir("/proc/self/task")? {
        let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
        total_ns += text.split_whitespace().next().context("an empty schedstat")?.parse::<f64>()?;
    }
    Ok(1e-9 * total_ns)
}

fn peak() -> Result<usize> {
    peak_bytes().context("no VmHWM")
}

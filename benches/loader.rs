//! Times the data pipeline from data set to batches: `cargo bench --bench loader -- DATA [--template FILE] [--threads
//! N] [--seconds S] [--only WORK]` prints images per second and thread, for decoding alone and with flips, masks and
//! other augmentation. `benches/peers/data.py` compares it with the published pipeline.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use maskinv::cli::keep_freed_memory;
use maskinv::data::mask::{MaskConfig, MaskProtocol};
use maskinv::data::{AugmentConfig, Dataset, Loader, LoaderConfig, Transform, open_source};

struct Args {
    data: PathBuf,
    template: Option<PathBuf>,
    threads: usize,
    seconds: f64,
    only: String,
}

impl Args {
    fn parse() -> Result<Option<Self>> {
        let (mut data, mut template, mut threads, mut seconds, mut only) = (None, None, 1, 3.0, String::new());
        // Cargo adds `--bench`.
        let mut args = std::env::args().skip(1).filter(|a| a != "--bench");
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg}: expected a value"));
            match arg.as_str() {
                "--template" => template = Some(value()?.into()),
                "--threads" => threads = value()?.parse().context("--threads")?,
                "--only" => only = value()?,
                "--seconds" => seconds = value()?.parse().context("--seconds")?,
                _ if arg.starts_with('-') || data.is_some() => bail!("{arg}: unexpected"),
                _ => data = Some(arg.into()),
            }
        }
        Ok(data.map(|data| Self { data, template, threads, seconds, only }))
    }
}

fn main() -> Result<()> {
    keep_freed_memory();
    let Some(args) = Args::parse()? else {
        println!(
            "usage: cargo bench --bench loader -- DATA [--template FILE] [--threads N] [--seconds S] [--only WORK]"
        );
        return Ok(());
    };
    let source = open_source(&args.data)?;
    println!("{source}, {} threads", args.threads);
    let images = source.images;
    let augment = |mask: f64, other: f64| AugmentConfig {
        flip: 0.5,
        mask,
        misalign: other,
        low_resolution: other,
        light: other,
        ..AugmentConfig::default()
    };
    let drawn = MaskConfig::default();
    let mut works = vec![
        ("decode, flip", augment(0.0, 0.0), drawn.clone()),
        ("decode, flip, drawn masks on half", augment(0.5, 0.0), drawn.clone()),
        ("decode, flip, drawn masks on all", augment(1.0, 0.0), drawn.clone()),
        ("decode, flip, masks on half, conditions on a fifth", augment(0.5, 0.2), drawn.clone()),
    ];
    if let Some(template) = args.template.clone() {
        let reference = MaskConfig { protocol: MaskProtocol::Reference, template: Some(template), ..drawn };
        works.push(("decode, flip, the template on half", augment(0.5, 0.0), reference.clone()));
        works.push(("decode, flip, the template on all", augment(1.0, 0.0), reference));
    }
    works.retain(|(name, ..)| name.contains(&args.only));
    if "read and decode".contains(&args.only) {
        time("read and decode", args.seconds, &args, images.as_ref())?;
    }
    for (name, augment, mask) in works {
        let config = LoaderConfig { batch_size: 128, threads: args.threads, ..LoaderConfig::default() };
        let loader = Loader::new(images.clone(), Transform::new(&augment, &mask)?, &config, 112, 0)?;
        let (mut num, mut epoch) = (0, 0);
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs_f64(args.seconds) {
            for batch in loader.epoch(epoch) {
                num += batch?.labels.len();
                if began.elapsed() >= Duration::from_secs_f64(args.seconds) {
                    break;
                }
            }
            epoch += 1;
        }
        report(name, num, began, &args);
    }
    Ok(())
}

/// Times decoding alone, on `args.threads` threads.
fn time(name: &str, seconds: f64, args: &Args, images: &dyn Dataset) -> Result<()> {
    let began = Instant::now();
    let decoded: Result<Vec<usize>> = std::thread::scope(|scope| {
        let work = |first: usize| {
            let mut num = 0;
            for index in (first..images.len()).step_by(args.threads).cycle() {
                images.get(index)?;
                num += 1;
                if began.elapsed() >= Duration::from_secs_f64(seconds) {
                    break;
                }
            }
            Ok(num)
        };
        let threads: Vec<_> = (0..args.threads).map(|first| scope.spawn(move || work(first))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| bail!("a thread panicked"))).collect()
    });
    report(name, decoded?.iter().sum(), began, args);
    Ok(())
}

fn report(name: &str, num: usize, began: Instant, args: &Args) {
    let per_thread = num as f64 / began.elapsed().as_secs_f64() / args.threads as f64;
    println!("{name:52} {per_thread:7.0} images/s and thread, {:5.0} us", 1e6 / per_thread);
}

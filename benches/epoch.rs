//! Measures memory over an epoch of a large RecordIO file: `cargo bench --bench epoch -- FOLDER [IMAGES] [--threads
//! N]` writes a file of the size of MS1MV2 into FOLDER unless it exists (5,822,653 images of 85,742 people, all the
//! same small JPEG: 7 GB), opens it, loads one epoch and prints the resident memory.

use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use image::{ImageFormat, Rgb, RgbImage};
use maskinv::Result as CrateResult;
use maskinv::cli::keep_freed_memory;
use maskinv::data::mask::MaskConfig;
use maskinv::data::{AugmentConfig, Dataset, Export, Loader, LoaderConfig, Transform, open_source, write_records};

/// Size of MS1MV2.
const IMAGES: usize = 5_822_653;
const PEOPLE: usize = 85_742;

/// A data set that repeats one image.
struct Same {
    num_images: usize,
    jpeg: Vec<u8>,
}

impl Same {
    fn new(num_images: usize) -> Result<Self> {
        let image = RgbImage::from_fn(112, 112, |x, y| Rgb([(x + y) as u8; 3]));
        let mut jpeg = Cursor::new(Vec::new());
        image.write_to(&mut jpeg, ImageFormat::Jpeg)?;
        Ok(Self { num_images, jpeg: jpeg.into_inner() })
    }
}

impl Dataset for Same {
    fn len(&self) -> usize {
        self.num_images
    }

    fn num_identities(&self) -> usize {
        PEOPLE.min(self.num_images)
    }

    fn label(&self, index: usize) -> u32 {
        (index * self.num_identities() / self.num_images) as u32
    }

    fn name(&self, index: usize) -> String {
        index.to_string()
    }

    fn encoded(&self, _index: usize) -> CrateResult<Option<Vec<u8>>> {
        Ok(Some(self.jpeg.clone()))
    }
}

fn main() -> Result<()> {
    keep_freed_memory();
    // Cargo adds `--bench`.
    let mut args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let mut threads = 2;
    if let Some(at) = args.iter().position(|a| a == "--threads") {
        threads = args.get(at + 1).context("--threads: expected a number")?.parse()?;
        args.drain(at..at + 2);
    }
    let Some(folder) = args.first().map(PathBuf::from) else {
        println!("usage: cargo bench --bench epoch -- FOLDER [IMAGES] [--threads N]");
        return Ok(());
    };
    let num_images = args.get(1).map_or(Ok(IMAGES), |n| n.parse()).context("IMAGES: expected a number")?;
    let path = folder.join(format!("same-{num_images}.rec"));
    if !path.is_file() {
        let began = Instant::now();
        let mut none = |_: usize| ();
        write_records(&mut Export::new(&Same::new(num_images)?, &mut none), &path)?;
        // The list of names is not measured.
        std::fs::remove_file(path.with_extension("lst"))?;
        println!("{}: written in {:.0} s", path.display(), began.elapsed().as_secs_f64());
    }
    epoch(&path, threads)
}

fn epoch(path: &Path, threads: usize) -> Result<()> {
    let before = resident()?;
    let began = Instant::now();
    let source = open_source(path)?;
    println!("{source}: opened in {:.1} s", began.elapsed().as_secs_f64());
    let index = resident()? - before;
    println!("index: {:.1} MB, {:.1} bytes an image", index / 1e6, index / source.images.len() as f64);
    let augment = AugmentConfig { mask: 0.0, ..AugmentConfig::default() };
    let config = LoaderConfig { batch_size: 512, threads, ..LoaderConfig::default() };
    let loader = Loader::new(source.images, Transform::new(&augment, &MaskConfig::default())?, &config, 112, 0)?;
    let (num_batches, began) = (loader.num_batches(), Instant::now());
    for (number, batch) in loader.epoch(0).enumerate() {
        batch?;
        if number % num_batches.div_ceil(10) == num_batches.div_ceil(10) / 2 {
            let rate = (number + 1) as f64 * 512.0 / began.elapsed().as_secs_f64();
            let share = 100.0 * number as f64 / num_batches as f64;
            println!("{share:3.0} % of the epoch: {:.0} MB resident, {rate:.0} images/s", resident()? / 1e6);
        }
    }
    Ok(())
}

/// Returns the resident memory of this process in bytes.
fn resident() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status").context("expected Linux's /proc")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(1024.0 * line.trim().trim_end_matches("kB").trim().parse::<f64>()?)
}

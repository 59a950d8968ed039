//! Measures a gallery of many people: `cargo bench --features gallery --bench gallery -- [PEOPLE]` enrols random embeddings,
//! one for each person, as `enrol` writes them, and prints times, sizes and memory.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use maskinv::gallery::{ColumnKind, Finder, Gallery, GalleryModel, NewFace, Pool};
use maskinv::machine::peak_bytes;
use maskinv::models::ComputedWith;
use maskinv::preprocessing::Preprocessing;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const DIM: usize = 512;
/// Faces of a transaction, as in `enrol`.
const AT_A_TIME: usize = 32;
/// Queries of each time, whose median is printed.
const ROUNDS: usize = 21;

fn main() -> Result<()> {
    // Cargo adds `--bench`.
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let num = match &args[..] {
        [] => 100_000,
        [num] => num.parse().context("expected a number of people")?,
        _ => bail!("expected [PEOPLE]"),
    };
    maskinv::workers::pool(0).build_global()?;
    let folder = tempfile::tempdir()?;
    measure(&folder.path().join("people.gallery"), num)
}

fn measure(path: &Path, num: usize) -> Result<()> {
    let weights = "0".repeat(64);
    let computed_with = ComputedWith { preprocessing: Preprocessing::default(), weights, precision: "f32".to_owned() };
    let model = GalleryModel { name: "random".to_owned(), embedding_size: DIM, computed_with };
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let began = Instant::now();
    let mut gallery = Gallery::open_or_create(path, &model)?;
    for first in (0..num).step_by(AT_A_TIME) {
        let faces: Vec<NewFace> = (first..num.min(first + AT_A_TIME)).map(|i| face(i, &mut rng)).collect();
        gallery.enrol(&faces)?;
    }
    let seconds = began.elapsed().as_secs_f64();
    let size = std::fs::metadata(path)?.len();
    println!(
        "{num} people: enrolled in {seconds:.1} s, {:.0} bytes each, {} MB",
        size as f64 / num as f64,
        size / 1_000_000
    );
    drop(gallery);

    let opened = Instant::now();
    let gallery = Gallery::open(path)?;
    println!("opened in {:.2} ms", 1e3 * opened.elapsed().as_secs_f64());
    for kind in ColumnKind::ALL {
        let began = Instant::now();
        let first = Finder::new(&gallery, kind, Pool::Best)?;
        let made = began.elapsed().as_secs_f64();
        drop(first);
        let mut times = Vec::new();
        for _ in 0..ROUNDS {
            let query = embedding(&mut rng);
            let began = Instant::now();
            let finder = Finder::new(&gallery, kind, Pool::Best)?;
            finder.search(&query, 5)?;
            times.push(1e3 * began.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        println!(
            "column {}: made in {made:.2} s, then {:.2} ms a search with the opening of the column",
            kind.name(),
            times[ROUNDS / 2]
        );
    }
    let began = Instant::now();
    let wrong = gallery.check()?;
    println!("checked in {:.2} s, {} faults", began.elapsed().as_secs_f64(), wrong.len());
    if let Some(peak) = peak_bytes() {
        println!("peak memory of it all: {} MB", peak / 1_000_000);
    }
    Ok(())
}

fn embedding(rng: &mut ChaCha8Rng) -> Vec<f32> {
    let values: Vec<f32> = (0..DIM).map(|_| rng.random_range(-1.0..1.0f32)).collect();
    let norm = values.iter().map(|v| v * v).sum::<f32>().sqrt();
    values.into_iter().map(|v| v / norm).collect()
}

fn face(i: usize, rng: &mut ChaCha8Rng) -> NewFace {
    let mut image = [0; 32];
    image[..8].copy_from_slice(&(i as u64).to_le_bytes());
    NewFace {
        person: format!("Person {i}"),
        embedding: embedding(rng),
        image,
        source: format!("photos/person-{i}/1.jpg"),
        enrolled: 1_700_000_000,
        score: Some(0.9),
        side: Some(100.0),
        sharpness: 500.0,
        mask: Some(0.1),
    }
}

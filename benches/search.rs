//! Times exact searches among embeddings of 512 elements: `cargo bench --bench search -- [ROWS]` prints the median time of
//! a few numbers of queries for rows of 32, 16 and 8 bits. With `--serve FILE`, or `--serve ROWS` for random rows of 8
//! bits, it answers lines `KIND QUERIES_FILE`, for `benches/peers/search.py`.

use std::io::{BufRead, Write};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use half::f16;
use maskinv::ops::search::{Hit, Int8Rows, Quantised, ROWS, Rows, block_len, search};
use rayon::prelude::*;

const DIM: usize = 512;
/// Rows that each query asks for.
const TOP: usize = 5;
/// Quantised rows whose products are computed again.
const AGAIN: usize = 8 * TOP + 32;
/// Rounds of which the median is printed.
const ROUNDS: usize = 5;

fn main() -> Result<()> {
    // Cargo adds `--bench`.
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    maskinv::workers::pool(0).build_global()?;
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--serve", source] => serve(source),
        [] => table(100_000),
        [rows] => table(rows.parse().context("expected a number of rows")?),
        _ => bail!("expected [ROWS], --serve FILE or --serve ROWS"),
    }
}

/// A number between -1 and 1 for each place.
fn noise(at: usize) -> f32 {
    let mut x = (at as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((x >> 40) as f32 / (1 << 23) as f32) - 1.0
}

fn table(num_rows: usize) -> Result<()> {
    let rows: Vec<f32> = (0..num_rows * DIM).into_par_iter().map(noise).collect();
    let half: Vec<f16> = rows.par_iter().map(|v| f16::from_f32(*v)).collect();
    let quantised = Quantised::of_rows(&rows, DIM);
    println!("{num_rows} rows, {} threads: ms (GB/s of rows, G products of elements/s)", rayon::current_num_threads());
    for num_queries in [1, 8, 64, 512] {
        let queries: Vec<f32> = (0..num_queries * DIM).map(|i| noise(i + 7 * num_rows * DIM)).collect();
        let of = [(Rows::F32(&rows), 4), (Rows::F16(&half), 2), (Rows::Int8(quantised.rows()), 1)];
        let mut line = format!("{num_queries:4} queries");
        for (kind, bytes) in of {
            let mut times = Vec::new();
            for _ in 0..ROUNDS {
                let began = Instant::now();
                search(kind, &queries, DIM, TOP)?;
                times.push(began.elapsed().as_secs_f64());
            }
            times.sort_by(f64::total_cmp);
            let (seconds, elements) = (times[ROUNDS / 2], (num_rows * DIM) as f64);
            let (read, done) =
                (elements * f64::from(bytes) / seconds / 1e9, elements * num_queries as f64 / seconds / 1e9);
            line += &format!("  {:8.2} ({read:5.1}, {done:6.1})", 1e3 * seconds);
        }
        println!("{line}");
    }
    Ok(())
}

/// The rows of a file of f32, in the precisions that were asked for.
struct Served {
    rows: Option<memmap2::Mmap>,
    half: Vec<f16>,
    quantised: Option<Quantised>,
    /// Blocks and scales of random rows.
    random: (Vec<i8>, Vec<f32>),
}

impl Served {
    fn f32(&self) -> &[f32] {
        self.rows.as_deref().map_or(&[], bytemuck::cast_slice)
    }

    fn search(&mut self, kind: &str, queries: &[f32]) -> Result<(f64, Vec<Vec<Hit>>)> {
        if kind == "f16" && self.half.is_empty() {
            self.half = self.f32().par_iter().map(|v| f16::from_f32(*v)).collect();
        }
        if kind == "int8" && self.quantised.is_none() && self.rows.is_some() {
            self.quantised = Some(Quantised::of_rows(self.f32(), DIM));
        }
        let began = Instant::now();
        let hits = match kind {
            "f32" => search(Rows::F32(self.f32()), queries, DIM, TOP)?,
            "f16" => search(Rows::F16(&self.half), queries, DIM, TOP)?,
            "int8" => match &self.quantised {
                Some(quantised) => self.again(queries, search(Rows::Int8(quantised.rows()), queries, DIM, AGAIN)?),
                None => {
                    let (blocks, scales) = &self.random;
                    let rows = Int8Rows { blocks, scales, num_rows: scales.len() };
                    search(Rows::Int8(rows), queries, DIM, AGAIN)?
                }
            },
            _ => bail!("{kind}: expected f32, f16 or int8"),
        };
        Ok((began.elapsed().as_secs_f64(), hits))
    }

    /// Ranks the hits of quantised rows by their products in f32.
    fn again(&self, queries: &[f32], mut found: Vec<Vec<Hit>>) -> Vec<Vec<Hit>> {
        for (query, hits) in queries.chunks_exact(DIM).zip(&mut found) {
            for hit in hits.iter_mut() {
                let row = &self.f32()[hit.row * DIM..][..DIM];
                hit.score = row.iter().zip(query).map(|(a, b)| a * b).sum();
            }
            hits.sort_by(|a, b| b.score.total_cmp(&a.score).then(a.row.cmp(&b.row)));
            hits.truncate(TOP);
        }
        found
    }
}

fn serve(source: &str) -> Result<()> {
    let mut served = Served { rows: None, half: Vec::new(), quantised: None, random: (Vec::new(), Vec::new()) };
    match source.parse::<usize>() {
        Ok(num_rows) => {
            let mut blocks = vec![0; num_rows.div_ceil(ROWS) * block_len(DIM)];
            blocks.par_iter_mut().enumerate().for_each(|(i, v)| *v = (127.0 * noise(i)) as i8);
            served.random = (blocks, vec![1.0; num_rows]);
        }
        Err(_) => {
            let file = std::fs::File::open(source).context(source.to_owned())?;
            // SAFETY: nobody writes to the file while the benchmark runs.
            served.rows = Some(unsafe { memmap2::Mmap::map(&file) }?);
        }
    }
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (kind, path) = line.split_once(' ').context("expected KIND QUERIES_FILE")?;
        let queries: Vec<f32> = bytemuck::cast_slice::<u8, f32>(&std::fs::read(path)?).to_vec();
        let (seconds, hits) = served.search(kind, &queries)?;
        let rows: Vec<Vec<usize>> =
            hits.iter().map(|hits| hits.iter().take(TOP).map(|hit| hit.row).collect()).collect();
        println!("{}", serde_json::json!({ "seconds": seconds, "rows": rows }));
        std::io::stdout().flush()?;
    }
    Ok(())
}

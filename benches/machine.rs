//! Peak performance of the machine: `cargo bench --bench machine` prints f32 GFLOP/s of fused multiply-add
//! instructions on registers, and memory bandwidth in GB/s read and written, with one thread and with all threads.

use std::hint::black_box;
use std::time::Instant;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Accumulators in registers: enough to hide the latency of fused multiply-add on all units.
const SUMS: usize = 12;
const ROUNDS: usize = 20_000_000;
const COPIED: usize = 32 << 20;

fn main() {
    let threads = rayon::current_num_threads();
    for threads in if threads > 1 { vec![1, threads] } else { vec![1] } {
        let pool = maskinv::workers::pool(threads).build().expect("a pool");
        let (flops, bytes) = pool.install(|| (best(|| fma(threads)), best(|| copy(threads))));
        println!("{threads} threads: {:.0} GF/s, {:.1} GB/s read and written", flops / 1e9, bytes / 1e9);
    }
}

/// Returns the best of five measurements, because the machine may be shared.
fn best(f: impl FnMut() -> f64) -> f64 {
    std::iter::repeat_with(f).take(5).fold(0.0, f64::max)
}

/// Returns floating-point operations per second.
fn fma(threads: usize) -> f64 {
    let began = Instant::now();
    let lanes: usize = (0..threads).into_par_iter().map(|_| Arch::new().dispatch(Fma)).sum();
    2.0 * (lanes * SUMS * ROUNDS) as f64 / began.elapsed().as_secs_f64()
}

struct Fma;

impl WithSimd for Fma {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> usize {
        let (a, b) = (simd.splat_f32s(black_box(0.999)), simd.splat_f32s(black_box(0.001)));
        let mut sums = [b; SUMS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = simd.mul_add_f32s(*sum, a, b);
            }
        }
        black_box(sums);
        S::F32_LANES
    }
}

/// Returns bytes read and written per second, from copies larger than the caches.
fn copy(threads: usize) -> f64 {
    let x = vec![1f32; COPIED];
    // Non-zero, because zeros would be pages that are not mapped yet.
    let mut y = vec![2f32; COPIED];
    let piece = COPIED / threads;
    let began = Instant::now();
    y.par_chunks_mut(piece).zip(x.par_chunks(piece)).for_each(|(y, x)| y.copy_from_slice(x));
    black_box(&y);
    8.0 * COPIED as f64 / began.elapsed().as_secs_f64()
}

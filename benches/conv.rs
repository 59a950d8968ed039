//! Times the convolutions of an IResNet and a MobileFaceNet: `cargo bench --bench conv -- [BATCH] [ROUNDS]` prints the
//! median time of each shape in milliseconds, and its throughput in GFLOP/s of the direct algorithm; of the forward
//! pass also from bytes to bytes.

use std::time::Instant;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use maskinv::ops::conv::int8::{Affine, Input, Int8Conv, Int8Weight, Output};
use maskinv::ops::conv::{ConvConfig, conv2d, conv2d_grad_w, conv2d_grad_x};

/// Input side, input channels, output channels, kernel size, stride, whether the convolution is depthwise.
const SHAPES: &[(usize, usize, usize, usize, usize, bool)] = &[
    (112, 3, 64, 3, 1, false),
    (112, 64, 64, 3, 1, false),
    (112, 64, 64, 3, 2, false),
    (112, 64, 64, 1, 2, false),
    (56, 64, 64, 3, 1, false),
    (56, 64, 128, 3, 1, false),
    (56, 128, 128, 3, 2, false),
    (28, 128, 128, 3, 1, false),
    (28, 256, 256, 3, 2, false),
    (14, 256, 256, 3, 1, false),
    (14, 512, 512, 3, 2, false),
    (7, 512, 512, 3, 1, false),
    (28, 128, 256, 1, 1, false),
    (28, 256, 256, 3, 1, true),
    (56, 128, 128, 3, 2, true),
];

fn main() -> Result<()> {
    // Cargo adds `--bench`.
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let number = |i: usize, default: usize| args.get(i).map_or(Ok(default), |n| n.parse()).context("expected a number");
    let (batch, rounds) = (number(0, 16)?, number(1, 5)?);
    maskinv::workers::pool(0).build_global()?;
    println!("batch {batch}, {} threads: ms (GF/s)", rayon::current_num_threads());
    println!("{:30} {:>16} {:>16} {:>16} {:>16}", "", "forward", "in 8 bits", "grad of input", "grad of weight");
    for &(side, c, co, kernel, stride, depthwise) in SHAPES {
        let config = ConvConfig { stride, padding: kernel / 2, groups: if depthwise { c } else { 1 } };
        let x = Tensor::randn(0f32, 1.0, (batch, side, side, c), &Device::Cpu)?;
        let w = Tensor::randn(0f32, 1.0, (co, c / config.groups, kernel, kernel), &Device::Cpu)?;
        let gy = conv2d(&x, &w, config)?.randn_like(0.0, 1.0)?;
        let forward = median(rounds, || conv2d(&x, &w, config).map(drop))?;
        let in_bytes = int8(&x, &w, config, rounds)?;
        let of_x = median(rounds, || conv2d_grad_x(&gy, &w, x.shape(), config).map(drop))?;
        let of_w = median(rounds, || conv2d_grad_w(&x, &gy, w.shape(), config).map(drop))?;
        let side = (side + 2 * (kernel / 2) - kernel) / stride + 1;
        let flops = 2.0 * (batch * side * side * co * c / config.groups * kernel * kernel) as f64;
        let shown = |s: f64| format!("{:8.2} ({:4.0})", 1e3 * s, flops / s / 1e9);
        let name =
            format!("{c} -> {co}, {kernel}x{kernel}/{stride} to {side}{}", if depthwise { " depthwise" } else { "" });
        let [forward, in_bytes, of_x, of_w] = [forward, in_bytes, of_x, of_w].map(shown);
        println!("{name:30} {forward:>16} {in_bytes:>16} {of_x:>16} {of_w:>16}");
    }
    Ok(())
}

/// Seconds of the convolution in 8 bits.
fn int8(x: &Tensor, w: &Tensor, config: ConvConfig, rounds: usize) -> Result<f64> {
    let (shape, w_shape): ([usize; 4], [usize; 4]) = (x.dims().try_into()?, w.dims().try_into()?);
    let affine = Affine::covering(-4.0, 4.0)?;
    let weight = Int8Weight::quantise(&w.flatten_all()?.to_vec1::<f32>()?, w_shape)?;
    let conv = Int8Conv::new(&weight, config, affine)?.into_bytes(affine);
    let bytes: Vec<u8> = x.flatten_all()?.to_vec1::<f32>()?.into_iter().map(|x| affine.quantise(x)).collect();
    let mut y = vec![0; conv.output_shape(shape)?.iter().product()];
    median(rounds, || conv.run(Input::Bytes(&bytes), shape, Output::Bytes(&mut y)))
}

fn median(rounds: usize, mut f: impl FnMut() -> candle_core::Result<()>) -> Result<f64> {
    f()?;
    let mut times = Vec::new();
    for _ in 0..rounds {
        let began = Instant::now();
        f()?;
        times.push(began.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[rounds / 2])
}

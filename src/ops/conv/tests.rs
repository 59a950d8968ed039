//! Tests of the f32 convolutions against the definition in f64, with every kind of vectors that this machine has.

use pulp::Arch;

use super::kernel::{Epilogue, Prologue};
use super::winograd::Tile;
use super::{Conv, Dims, dense, grouped};

fn archs() -> Vec<Arch> {
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut, reason = "nothing to add"))]
    let mut archs = vec![Arch::Scalar, Arch::new()];
    #[cfg(target_arch = "x86_64")]
    archs.extend(pulp::x86::V3::try_new().map(Arch::V3));
    archs
}

fn values(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / u32::MAX as f32 - 0.5
    };
    (0..len).map(|_| next()).collect()
}

fn dims([n, h, w, c, co]: [usize; 5], [kernel, stride, padding]: [usize; 3]) -> Dims {
    let out = |side: usize| (side + 2 * padding - kernel) / stride + 1;
    Dims { n, h, w, c, ho: out(h), wo: out(w), co, kh: kernel, kw: kernel, stride, padding, groups: 1 }
}

/// Returns the root-mean-square and the largest difference from the f64 result, relative to the result's root mean
/// square.
fn errors(found: &[f32], expected: &[f64]) -> [f64; 2] {
    assert_eq!(found.len(), expected.len());
    let differences = || found.iter().zip(expected).map(|(&f, e)| (f64::from(f) - e).abs());
    let rms = |sum: f64| (sum / expected.len() as f64).sqrt();
    let size = rms(expected.iter().map(|v| v * v).sum());
    [rms(differences().map(|d| d * d).sum()) / size, differences().fold(0.0, f64::max) / size]
}

fn assert_close(what: &str, found: &[f32], expected: &[f64]) {
    let [rms, largest] = errors(found, expected);
    assert!(rms < 6e-6 && largest < 1e-4, "{what}: rms {rms:e}, largest {largest:e}");
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| f64::from(v)).collect()
}

/// `z` above zero, `slope * z` elsewhere.
fn prelu(z: f64, slope: f32) -> f64 {
    if z > 0.0 { z } else { z * f64::from(slope) }
}

/// A pass by its definition, in f64.
type Definition = fn(&[f64], &[f64], Dims, &mut [f64]);

/// Compares the forward pass and the gradients of input and weight with the definition, with and without prologue and
/// epilogue.
fn check(conv: Conv, d: Dims) {
    let x = values(d.n * d.h * d.w * d.c, 1);
    let w = values(d.co * d.c / d.groups * d.kh * d.kw, 2);
    let gy = values(d.pixels() * d.co, 3);
    let [scale, shift, before] = [4, 5, 6].map(|seed| values(d.c, seed));
    let [bias, after] = [7, 8].map(|seed| values(d.co, seed));
    let (residual, residual_x) = (values(gy.len(), 9), values(x.len(), 10));
    let prologues = [
        Prologue::default(),
        Prologue { affine: Some([&scale, &shift]), slope: None },
        Prologue { affine: Some([&scale, &shift]), slope: Some(&before) },
    ];
    let whole = &Epilogue { bias: Some(&bias), slope: Some(&after), residual: Some(&residual) };
    for prologue in prologues {
        let seen: Vec<f64> = (0..x.len())
            .map(|i| {
                let affine = |[scale, shift]: [&[f32]; 2]| x[i].mul_add(scale[i % d.c], shift[i % d.c]);
                let z = f64::from(prologue.affine.map_or(x[i], affine));
                prologue.slope.map_or(z, |slope| prelu(z, slope[i % d.c]))
            })
            .collect();
        let (mut y, mut gw) = (vec![0.0; d.pixels() * d.co], vec![0.0; w.len()]);
        let (forward, grad_w): (Definition, Definition) = match d.groups {
            1 => (dense::forward, dense::grad_w),
            _ => (grouped::forward, grouped::grad_w),
        };
        forward(&seen, &wide(&w), d, &mut y);
        grad_w(&seen, &wide(&gy), d, &mut gw);
        let finished: Vec<f64> = (0..y.len())
            .map(|i| prelu(y[i] + f64::from(bias[i % d.co]), after[i % d.co]) + f64::from(residual[i]))
            .collect();
        for arch in archs() {
            let conv = conv.on(arch);
            let name = |pass: &str| format!("{pass} of {d:?}, {}, {arch:?}, {prologue:?}", conv.method());
            for (epilogue, expected) in [(&Epilogue::default(), &y), (whole, &finished)] {
                let mut found = vec![f32::NAN; y.len()];
                conv.forward(&x, prologue, &w, *epilogue, &mut found);
                assert_close(&name("forward"), &found, expected);
                let mut packed = vec![f32::NAN; y.len()];
                conv.forward_packed(&x, prologue, &conv.pack(&w), *epilogue, &mut packed);
                assert_eq!(found, packed);
            }
            let mut found = vec![f32::NAN; gw.len()];
            conv.grad_w(&x, prologue, &gy, &mut found);
            assert_close(&name("grad_w"), &found, &gw);
        }
    }
    let mut gx = vec![0.0; x.len()];
    let grad_x: Definition = if d.groups == 1 { dense::grad_x } else { grouped::grad_x };
    grad_x(&wide(&gy), &wide(&w), d, &mut gx);
    let added: Vec<f64> = gx.iter().zip(&residual_x).map(|(gx, &r)| gx + f64::from(r)).collect();
    let residual = Epilogue { residual: Some(&residual_x), ..Epilogue::default() };
    for arch in archs() {
        for (epilogue, expected) in [(Epilogue::default(), &gx), (residual, &added)] {
            let mut found = vec![f32::NAN; gx.len()];
            conv.on(arch).grad_x(&gy, &w, epilogue, &mut found);
            assert_close(&format!("grad_x of {d:?}, {}, {arch:?}", conv.method()), &found, expected);
        }
    }
}

#[test]
fn winograds_passes_equal_the_definition() {
    for (size, padding) in [
        ([1, 3, 3, 16, 16], 1),
        ([1, 5, 7, 32, 16], 1),
        ([2, 5, 8, 16, 48], 0),
        ([3, 6, 5, 80, 112], 2),
        ([2, 14, 14, 256, 256], 1),
        ([1, 29, 31, 64, 64], 1),
        ([9, 7, 7, 128, 192], 1),
        ([40, 9, 9, 144, 128], 1),
    ] {
        let d = dims(size, [3, 1, padding]);
        for tile in Tile::ALL {
            check(Conv::of(d).by_winograd(tile), d);
        }
    }
}

/// `-- --nocapture` prints the errors.
#[test]
fn winograds_error_at_the_shapes_of_r100() {
    println!("{:14} {:>6} {:>10} {:>10} {:>10}", "side, channels", "tile", "forward", "of input", "of weight");
    for [side, c] in [[112, 64], [56, 64], [28, 128], [14, 256], [7, 512]] {
        let d = dims([1, side, side, c, c], [3, 1, 1]);
        let (x, w, gy) = (values(side * side * c, 1), values(c * c * 9, 2), values(side * side * c, 3));
        let [mut y, mut gx, mut gw] = [gy.len(), x.len(), w.len()].map(|len| vec![0.0; len]);
        dense::forward(&wide(&x), &wide(&w), d, &mut y);
        dense::grad_x(&wide(&gy), &wide(&w), d, &mut gx);
        dense::grad_w(&wide(&x), &wide(&gy), d, &mut gw);
        let by_patches = Conv::of(d).by_patches();
        let methods = Tile::ALL.map(|tile| by_patches.by_winograd(tile));
        for conv in [by_patches].into_iter().chain(methods) {
            let error = |expected: &[f64], f: &dyn Fn(&mut [f32])| {
                let mut found = vec![f32::NAN; expected.len()];
                f(&mut found);
                errors(&found, expected)[0]
            };
            let errors = [
                error(&y, &|y| conv.forward(&x, Prologue::default(), &w, Epilogue::default(), y)),
                error(&gx, &|gx| conv.grad_x(&gy, &w, Epilogue::default(), gx)),
                error(&gw, &|gw| conv.grad_w(&x, Prologue::default(), &gy, gw)),
            ];
            let [forward, input, weight] = errors.map(|error| format!("{error:.1e}"));
            println!("{side:5} {c:8} {:>6} {forward:>10} {input:>10} {weight:>10}", conv.method());
            assert!(errors.iter().all(|&error| error < 6e-6), "{d:?}, {}: {errors:?}", conv.method());
        }
    }
}

#[test]
fn the_passes_by_patches_equal_the_definition() {
    for (size, kernel) in [
        ([1, 1, 1, 16, 16], [1, 1, 0]),
        ([2, 9, 7, 3, 64], [3, 1, 1]),
        ([2, 9, 7, 32, 48], [3, 2, 1]),
        ([1, 8, 8, 16, 16], [3, 2, 1]),
        ([3, 7, 7, 64, 128], [1, 2, 0]),
        ([2, 8, 6, 80, 16], [1, 1, 0]),
        ([5, 7, 7, 32, 16], [7, 1, 0]),
        ([1, 6, 5, 16, 32], [2, 3, 1]),
        ([2, 6, 7, 32, 48], [3, 1, 1]),
        ([7, 28, 28, 64, 128], [3, 2, 1]),
        ([3, 14, 14, 256, 272], [3, 2, 1]),
        ([9, 56, 56, 3, 64], [3, 1, 1]),
        ([2, 9, 8, 7, 32], [5, 2, 2]),
    ] {
        let d = dims(size, kernel);
        check(Conv::of(d).by_patches(), d);
    }
}

#[test]
fn the_depthwise_passes_equal_the_definition() {
    for (size, kernel) in [
        ([1, 1, 1, 16], [3, 1, 1]),
        ([2, 9, 7, 32], [3, 1, 1]),
        ([2, 9, 8, 48], [3, 2, 1]),
        ([3, 7, 7, 64], [7, 1, 0]),
        ([1, 6, 5, 16], [2, 3, 1]),
        ([2, 19, 21, 16], [3, 1, 1]),
        ([5, 14, 14, 112], [3, 1, 1]),
    ] {
        let [n, h, w, c] = size;
        // Depthwise, then groups of two inputs and two outputs.
        for groups in [c, c / 2] {
            let d = Dims { groups, ..dims([n, h, w, c, c], kernel) };
            let conv = Conv::of(d);
            let has_too_many_taps = (kernel, groups) == ([7, 1, 0], c / 2);
            assert_eq!(conv.method(), if has_too_many_taps { "Direct" } else { "Depthwise" });
            check(conv, d);
        }
    }
}

#[test]
fn the_passes_of_any_channels_equal_the_definition() {
    for (size, kernel, groups) in [
        ([2, 1, 1, 64, 4], [1, 1, 0], 1),
        ([2, 1, 1, 4, 64], [1, 1, 0], 1),
        ([2, 7, 9, 24, 40], [3, 2, 1], 1),
        ([1, 6, 5, 5, 16], [3, 1, 1], 1),
        ([2, 6, 5, 9, 9], [3, 1, 1], 9),
        ([2, 6, 5, 48, 24], [3, 2, 1], 12),
    ] {
        let d = Dims { groups, ..dims(size, kernel) };
        check(Conv::of(d), d);
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    for (c, kernel, groups) in [
        (64, [3, 1, 1], 1),
        (64, [3, 2, 1], 1),
        (64, [3, 1, 1], 64),
        (64, [3, 2, 1], 32),
        (24, [3, 2, 1], 1),
        (24, [3, 1, 1], 24),
    ] {
        let d = Dims { groups, ..dims([5, 14, 14, c, c], kernel) };
        let conv = Conv::of(d);
        let conv = if kernel == [3, 1, 1] && groups == 1 && c == 64 { conv.by_winograd(Tile::Three) } else { conv };
        let w = values(d.co * d.c / groups * 9, 2);
        let (x, gy) = (values(d.n * d.h * d.w * d.c, 1), values(d.pixels() * d.co, 3));
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            let (mut y, mut gx, mut gw) = (gy.clone(), x.clone(), w.clone());
            pool.install(|| {
                conv.forward(&x, Prologue::default(), &w, Epilogue::default(), &mut y);
                conv.grad_x(&gy, &w, Epilogue::default(), &mut gx);
                conv.grad_w(&x, Prologue::default(), &gy, &mut gw);
            });
            [y, gx, gw]
        };
        // One thread works in pieces, twenty work in phases.
        assert_eq!(run(1), run(20));
    }
}

//! The f32 convolutions against the definition in f64, with the vectors of every machine that this one can be.

use pulp::Arch;

use super::kernel::{Epilogue, Prologue};
use super::{Dims, dense, depthwise, grouped, patches, winograd};

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

/// The root mean square and the largest difference from the f64 result, relative to the result's root mean square.
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

type Forward = fn(&[f32], &[f32], Dims, Arch) -> Vec<f32>;

/// Compares forward, the gradient of the input and the gradient of the weight.
fn check(d: Dims, [forward, grad_x, grad_w]: [Option<Forward>; 3]) {
    let x = values(d.n * d.h * d.w * d.c, 1);
    let w = values(d.co * d.c / d.groups * d.kh * d.kw, 2);
    let gy = values(d.pixels() * d.co, 3);
    let wide = |x: &[f32]| x.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
    let (x64, w64, gy64) = (wide(&x), wide(&w), wide(&gy));
    let expected = match d.groups {
        1 => (dense::forward(&x64, &w64, d), dense::grad_x(&gy64, &w64, d), dense::grad_w(&x64, &gy64, d)),
        _ => (grouped::forward(&x64, &w64, d), grouped::grad_x(&gy64, &w64, d), grouped::grad_w(&x64, &gy64, d)),
    };
    for arch in archs() {
        let name = |pass: &str| format!("{pass} of {d:?}, {arch:?}");
        if let Some(forward) = forward {
            assert_close(&name("forward"), &forward(&x, &w, d, arch), &expected.0);
        }
        if let Some(grad_x) = grad_x {
            assert_close(&name("grad_x"), &grad_x(&gy, &w, d, arch), &expected.1);
        }
        if let Some(grad_w) = grad_w {
            assert_close(&name("grad_w"), &grad_w(&x, &gy, d, arch), &expected.2);
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
        assert!(winograd::fits(d));
        check(d, [Some(winograd::forward), Some(winograd::grad_x), Some(winograd::grad_w)]);
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
        ([7, 28, 28, 64, 128], [3, 2, 1]),
        ([3, 14, 14, 256, 272], [3, 2, 1]),
        ([9, 56, 56, 3, 64], [3, 1, 1]),
    ] {
        let d = dims(size, kernel);
        assert!(patches::fits(d));
        let grad_x = patches::fits_grad_x(d).then_some(patches::grad_x as Forward);
        check(d, [Some(patches::forward), grad_x, Some(patches::grad_w)]);
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
        ([5, 14, 14, 112], [3, 1, 1]),
    ] {
        let [n, h, w, c] = size;
        // Depthwise, groups of two in and out, one in and two out.
        for (groups, co) in [(c, c), (c / 2, c), (c, 2 * c)] {
            let d = Dims { groups, ..dims([n, h, w, c, co], kernel) };
            assert!(depthwise::fits(d));
            check(d, [Some(depthwise::forward), Some(depthwise::grad_x), Some(depthwise::grad_w)]);
        }
    }
}

#[test]
fn prologue_and_epilogue_are_applied_and_the_border_stays_zero() {
    let d = dims([2, 6, 7, 32, 48], [3, 1, 1]);
    let (x, w) = (values(d.n * d.h * d.w * d.c, 1), values(d.co * d.c * 9, 2));
    let (scale, shift) = (values(d.c, 3), values(d.c, 4));
    let (bias, slope, residual) = (values(d.co, 5), values(d.co, 6), values(d.pixels() * d.co, 7));
    let moved: Vec<f32> = x.iter().enumerate().map(|(i, &x)| x * scale[i % d.c] + shift[i % d.c]).collect();
    let wide = |x: &[f32]| x.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
    let mut expected = dense::forward(&wide(&moved), &wide(&w), d);
    for (i, y) in expected.iter_mut().enumerate() {
        *y += f64::from(bias[i % d.co]);
        *y = if *y > 0.0 { *y } else { *y * f64::from(slope[i % d.co]) } + f64::from(residual[i]);
    }
    let epilogue = Epilogue { bias: Some(&bias), slope: Some(&slope), residual: Some(&residual) };
    for arch in archs() {
        let mut y = vec![f32::NAN; d.pixels() * d.co];
        let prologue = Prologue { affine: Some([&scale, &shift]) };
        winograd::convolve(&x, &winograd::Filter::new(&w, d, arch), d, prologue, epilogue, &mut y);
        assert_close(&format!("winograd, {arch:?}"), &y, &expected);
        y.fill(f32::NAN);
        patches::convolve(&moved, &patches::Filter::new(&w, d, arch), d, epilogue, &mut y);
        assert_close(&format!("patches, {arch:?}"), &y, &expected);
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let arch = Arch::new();
    for kernel in [[3, 1, 1], [3, 2, 1]] {
        let d = dims([5, 14, 14, 64, 64], kernel);
        let (x, w, gy) = (values(d.n * d.h * d.w * d.c, 1), values(d.co * d.c * 9, 2), values(d.pixels() * d.co, 3));
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            pool.install(|| match kernel {
                [_, 1, _] => [
                    winograd::forward(&x, &w, d, arch),
                    winograd::grad_x(&gy, &w, d, arch),
                    winograd::grad_w(&x, &gy, d, arch),
                ],
                _ => [
                    patches::forward(&x, &w, d, arch),
                    patches::grad_x(&gy, &w, d, arch),
                    patches::grad_w(&x, &gy, d, arch),
                ],
            })
        };
        // One thread takes pieces, twenty go by phases.
        assert_eq!(run(1), run(20));
    }
}

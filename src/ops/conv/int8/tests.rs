use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

/// A convolution of some sizes, its input, and what it must compute: from the bytes, without quantising the result.
struct Case {
    conv: Int8Conv,
    shape: [usize; 4],
    bytes: Vec<u8>,
    floats: Vec<f32>,
    residual: Vec<f32>,
    /// By candle, in f64.
    expected: Vec<f64>,
}

const INPUT: Affine = Affine { scale: 0.031, zero: 77 };

fn case([n, side, c, co]: [usize; 4], kernel: usize, config: ConvConfig, seed: u64) -> Result<Case> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (shape, w) = ([n, side, side, c], [co, c / config.groups, kernel, kernel]);
    let mut floats =
        |len: usize, low: f32, high: f32| -> Vec<f32> { (0..len).map(|_| rng.random_range(low..high)).collect() };
    let values = floats(n * side * side * c, -3.0, 6.0);
    let weight = Int8Weight::quantise(&floats(w.iter().product(), -0.2, 0.2), w)?;
    let (bias, slope) = (floats(co, -1.0, 1.0), floats(co, 0.1, 0.4));
    let bytes: Vec<u8> = values.iter().map(|value| INPUT.quantise(*value)).collect();
    let seen: Vec<f64> = bytes.iter().map(|byte| f64::from(INPUT.value(*byte))).collect();
    let device = &Device::Cpu;
    let x = Tensor::from_vec(seen, &shape, device)?;
    let w64: Vec<f64> = weight.dequantised().into_iter().map(f64::from).collect();
    let y = super::super::conv2d_reference(&x, &Tensor::from_vec(w64, &w, device)?, config)?;
    let residual = floats(y.elem_count(), -1.0, 1.0);
    let expected = y.flatten_all()?.to_vec1::<f64>()?.into_iter().enumerate().map(|(i, value)| {
        let value = value + f64::from(bias[i % co]);
        let value = if value > 0.0 { value } else { value * f64::from(slope[i % co]) };
        value + f64::from(residual[i])
    });
    let expected = expected.collect();
    let conv = Int8Conv::new(&weight, config, INPUT, bias, Some(slope))?;
    Ok(Case { conv, shape, bytes, floats: values, residual, expected })
}

const SAME: ConvConfig = ConvConfig { stride: 1, padding: 1, groups: 1 };

fn cases() -> Result<Vec<Case>> {
    let plain = ConvConfig::default();
    [
        case([2, 7, 32, 48], 1, plain, 0),
        case([1, 9, 16, 24], 3, SAME, 1),
        case([2, 8, 5, 7], 3, ConvConfig { stride: 2, ..SAME }, 2),
        case([1, 5, 3, 16], 5, ConvConfig { padding: 2, ..plain }, 3),
        case([2, 9, 32, 32], 3, ConvConfig { groups: 32, ..SAME }, 4),
        case([1, 8, 24, 24], 3, ConvConfig { stride: 2, groups: 24, ..SAME }, 5),
    ]
    .into_iter()
    .collect()
}

#[test]
fn results_are_those_of_the_numbers_that_the_bytes_stand_for() -> Result<()> {
    for (i, case) in cases()?.into_iter().enumerate() {
        let Case { conv, shape, bytes, floats, residual, expected } = &case;
        for x in [Input::Bytes(bytes), Input::Floats(floats)] {
            let mut y = vec![0.0; expected.len()];
            conv.run(x, *shape, Some(residual), Output::Floats(&mut y))?;
            for (found, expected) in y.iter().zip(expected) {
                assert!((f64::from(*found) - expected).abs() < 1e-5, "case {i}: {found}, expected {expected}");
            }
            let affine = Affine::covering(-4.0, 7.0)?;
            let mut quantised = vec![0; expected.len()];
            conv.run(x, *shape, Some(residual), Output::Bytes(&mut quantised, affine))?;
            let of_floats: Vec<u8> = y.iter().map(|value| affine.quantise(*value)).collect();
            assert_eq!(quantised, of_floats, "case {i}");
        }
    }
    Ok(())
}

#[test]
fn sums_are_exact_with_all_instructions() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for k in [2, 10, 128, 66_000] {
        // The largest values, whose products of a pair do not fit into 16 bits, come first.
        let mut rows: Vec<i16> = (0..ROWS * k).map(|_| rng.random_range(-255..=255)).collect();
        let mut filter: Vec<i16> = (0..WIDTH * k).map(|_| rng.random_range(-127..=127)).collect();
        rows[..k].fill(255);
        filter.iter_mut().take(WIDTH * k).step_by(2).for_each(|value| *value = 127);
        let mut found = [[0; WIDTH]; ROWS];
        Tile::of_machine().multiply(&rows, &filter, &mut found);
        let mut portable = [[0; WIDTH]; ROWS];
        Tile::Portable.multiply(&rows, &filter, &mut portable);
        assert_eq!(found, portable, "{k} columns");
        for (r, found) in portable.iter().enumerate() {
            for (o, found) in found.iter().enumerate() {
                let product = |column: usize| {
                    i64::from(rows[r * k + column]) * i64::from(filter[(column / 2 * WIDTH + o) * 2 + column % 2])
                };
                assert_eq!(i64::from(*found), (0..k).map(product).sum::<i64>(), "row {r}, output {o} of {k} columns");
            }
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() -> Result<()> {
    for case in cases()? {
        let run = |threads: usize| -> Result<Vec<f32>> {
            let pool =
                rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(candle_core::Error::wrap)?;
            let mut y = vec![0.0; case.expected.len()];
            pool.install(|| case.conv.run(Input::Bytes(&case.bytes), case.shape, None, Output::Floats(&mut y)))?;
            Ok(y)
        };
        assert_eq!(run(1)?, run(3)?);
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_an_error() -> Result<()> {
    let weight = Int8Weight::quantise(&[0.5; 32], [2, 16, 1, 1])?;
    assert_eq!(weight.values(), [127; 32]);
    let conv = |groups, bias: usize| {
        Int8Conv::new(&weight, ConvConfig { groups, ..Default::default() }, INPUT, vec![0.0; bias], None)
    };
    assert!(conv(1, 3).is_err() && conv(2, 2).is_err());
    let mut y = [0.0; 8];
    let run = |x: &[u8], y: &mut [f32]| conv(1, 2)?.run(Input::Bytes(x), [1, 2, 2, 16], None, Output::Floats(y));
    run(&[0; 64], &mut y)?;
    assert!(run(&[0; 63], &mut y).is_err() && run(&[0; 64], &mut y[1..]).is_err());
    assert!(Int8Weight::quantise(&[f32::NAN; 4], [1, 4, 1, 1]).is_err());
    assert!(Int8Weight::quantise(&[1.0; 3], [1, 4, 1, 1]).is_err());
    assert!(Int8Weight::new([1, 1, 1, 1], vec![-128], vec![1.0]).is_err());
    assert!(Int8Weight::new([1, 1, 1, 1], vec![1], vec![0.0]).is_err());
    Ok(())
}

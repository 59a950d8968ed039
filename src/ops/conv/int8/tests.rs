use candle_core::{Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::product::{Column, Tile};
use super::*;
use crate::ops::channels::Constants;

/// A convolution of some sizes, its input, and what it must compute: from the bytes, without quantising the result.
struct Case {
    weight: Int8Weight,
    config: ConvConfig,
    /// What follows.
    map: Constants,
    shape: [usize; 4],
    bytes: Vec<u8>,
    floats: Vec<f32>,
    /// Floats that the prologue makes `floats`.
    before: Vec<f32>,
    prologue: Constants,
    residual: Vec<f32>,
    /// By candle, in f64, without the residual.
    expected: Vec<f64>,
}

const INPUT: Affine = Affine { scale: 0.031, zero: 77 };

fn case([n, side, c, co]: [usize; 4], kernel: usize, config: ConvConfig, seed: u64) -> Result<Case> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (shape, w) = ([n, side, side, c], [co, c / config.groups, kernel, kernel]);
    let mut floats =
        |len: usize, low: f32, high: f32| -> Vec<f32> { (0..len).map(|_| rng.random_range(low..high)).collect() };
    let before = floats(n * side * side * c, -3.0, 6.0);
    let prologue =
        Constants { scale: floats(c, 0.5, 1.0), shift: floats(c, -1.0, 1.0), slope: Some(floats(c, 0.1, 0.4)) };
    let slope = prologue.slope.as_deref().unwrap_or_default();
    let prelu = |value: f32, slope: f32| if value > 0.0 { value } else { value * slope };
    let see = |(i, x): (usize, &f32)| prelu(x.mul_add(prologue.scale[i % c], prologue.shift[i % c]), slope[i % c]);
    let values: Vec<f32> = before.iter().enumerate().map(see).collect();
    let weight = Int8Weight::quantise(&floats(w.iter().product(), -0.2, 0.2), w)?;
    let map =
        Constants { scale: floats(co, -2.0, 2.0), shift: floats(co, -1.0, 1.0), slope: Some(floats(co, 0.1, 0.4)) };
    let bytes: Vec<u8> = values.iter().map(|value| INPUT.quantise(*value)).collect();
    let seen: Vec<f64> = bytes.iter().map(|byte| f64::from(INPUT.value(*byte))).collect();
    let device = &Device::Cpu;
    let x = Tensor::from_vec(seen, &shape, device)?;
    let w64: Vec<f64> = weight.dequantised().into_iter().map(f64::from).collect();
    let y = super::super::conv2d_reference(&x, &Tensor::from_vec(w64, &w, device)?, config)?;
    let residual = floats(y.elem_count(), -1.0, 1.0);
    let expected = y.flatten_all()?.to_vec1::<f64>()?.into_iter().enumerate().map(|(i, value)| {
        let value = value * f64::from(map.scale[i % co]) + f64::from(map.shift[i % co]);
        if value > 0.0 { value } else { value * f64::from(map.slope.as_deref().unwrap_or_default()[i % co]) }
    });
    let expected = expected.collect();
    Ok(Case { weight, config, map, shape, bytes, floats: values, before, prologue, residual, expected })
}

impl Case {
    fn conv(&self, kind: Kind) -> Result<Int8Conv> {
        Ok(Int8Conv::with(&self.weight, self.config, INPUT, kind)?
            .followed_by([&self.map.scale, &self.map.shift], self.map.slope.as_deref()))
    }
}

/// All that this machine has.
fn kinds() -> Vec<Kind> {
    let mut kinds = vec![Kind::Pairs, Kind::Quads];
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        kinds.push(Kind::Avx2);
    }
    if !kinds.contains(&Kind::of_machine()) {
        kinds.push(Kind::of_machine());
    }
    kinds
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
        case([3, 7, 20, 20], 7, ConvConfig { groups: 20, ..plain }, 6),
    ]
    .into_iter()
    .collect()
}

#[test]
fn results_are_those_of_the_numbers_that_the_bytes_stand_for() -> Result<()> {
    for (i, case) in cases()?.into_iter().enumerate() {
        let Case { shape, bytes, floats, before, residual, expected, .. } = &case;
        let prologue = Prologue {
            affine: Some([&case.prologue.scale, &case.prologue.shift]),
            slope: case.prologue.slope.as_deref(),
        };
        for kind in kinds() {
            let (conv, plain) = (case.conv(kind)?, Prologue::default());
            let steps = Affine::covering(-4.0, 7.0)?;
            let in_bytes = conv.clone().into_bytes(steps);
            for (x, prologue) in
                [(Input::Bytes(bytes), plain), (Input::Floats(floats), plain), (Input::Floats(before), prologue)]
            {
                let mut y = vec![0.0; expected.len()];
                conv.run_between(x, prologue, *shape, Some(residual), Output::Floats(&mut y))?;
                for ((found, expected), residual) in y.iter().zip(expected).zip(residual) {
                    let expected = expected + f64::from(*residual);
                    assert!((f64::from(*found) - expected).abs() < 2e-5, "case {i}, {kind:?}: {found}, {expected}");
                }
                let mut quantised = vec![0; expected.len()];
                in_bytes.run_between(x, prologue, *shape, None, Output::Bytes(&mut quantised))?;
                for (found, expected) in quantised.iter().zip(expected) {
                    let exact = (expected / f64::from(steps.scale) + f64::from(steps.zero)).clamp(0.0, 255.0);
                    assert!((f64::from(*found) - exact).abs() < 0.501, "case {i}, {kind:?}: {found}, {exact}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn depthwise_sums_are_the_same_without_avx2() -> Result<()> {
    for mut case in cases()?.into_iter().filter(|case| case.config.groups > 1) {
        case.map.shift.fill(0.0);
        let mut found = Vec::new();
        for has_avx2 in [false, cfg!(target_arch = "x86_64") && Kind::of_machine() != Kind::Pairs] {
            let taps = depthwise::Taps::with(&case.weight, has_avx2);
            let conv = Int8Conv { filter: Filter::Depthwise(taps), ..case.conv(Kind::Pairs)? };
            let mut y = vec![0.0; case.expected.len()];
            conv.run(Input::Bytes(&case.bytes), case.shape, Output::Floats(&mut y))?;
            found.push(y);
        }
        assert_eq!(found[0], found[1]);
    }
    Ok(())
}

#[test]
fn sums_are_exact_with_all_instructions() {
    fn check<L: Tile>(tile: L, largest: i32) {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for k in [4, 12, 128, 66_000] {
            for num in 1..=L::ROWS {
                // The largest values, whose products of a pair do not fit into 16 bits, come first.
                let all =
                    |rng: &mut ChaCha8Rng| -> Vec<u8> { (0..num * k).map(|_| rng.random_range(0..=255)).collect() };
                let mut bytes = all(&mut rng);
                bytes[..k].fill(255);
                let (mut rows, zero) = (vec![L::Column::zero(INPUT); num * k], (255 - largest) as u8);
                L::Column::of_bytes(Affine { scale: 1.0, zero }, &bytes, &mut rows);
                let mut filter: Vec<i8> = (0..L::WIDTH * k).map(|_| rng.random_range(-127..=127)).collect();
                filter.iter_mut().step_by(L::STEP).for_each(|value| *value = 127);
                let starts: Vec<i32> = (0..L::WIDTH).map(|_| rng.random_range(-1000..1000)).collect();
                let mut sums = [0.0; product::MOST_SUMS];
                tile.multiply(&rows, k, &filter, &starts, &mut sums);
                for r in 0..num {
                    for o in 0..L::WIDTH {
                        let product = |column: usize| {
                            let of_filter = filter[(column / L::STEP * L::WIDTH + o) * L::STEP + column % L::STEP];
                            let of_row: i32 = rows[r * k + column].into();
                            i64::from(of_row) * i64::from(of_filter)
                        };
                        let expected = i64::from(starts[o]) + (0..k).map(product).sum::<i64>();
                        assert_eq!(
                            sums[r * L::WIDTH + o],
                            expected as f32,
                            "row {r} of {num}, output {o}, {k} columns"
                        );
                    }
                }
            }
        }
    }
    check(product::Portable::<i16, 2>::NEW, 255);
    check(product::Portable::<u8, 4>::NEW, 255);
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") {
            check(product::Avx2, 255);
            check(product::Avx2, 0);
        }
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni") {
            check(product::Vnni, 255);
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() -> Result<()> {
    for case in cases()? {
        let run = |threads: usize| -> Result<Vec<f32>> {
            let pool =
                rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(candle_core::Error::wrap)?;
            let (conv, mut y) = (case.conv(Kind::of_machine())?, vec![0.0; case.expected.len()]);
            pool.install(|| conv.run(Input::Bytes(&case.bytes), case.shape, Output::Floats(&mut y)))?;
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
    let conv = |groups| Int8Conv::new(&weight, ConvConfig { groups, ..Default::default() }, INPUT);
    assert!(conv(2).is_err() && conv(1)?.output_shape([1, 2, 2, 8]).is_err());
    let mut y = [0.0; 8];
    let run = |x: &[u8], y: &mut [f32]| conv(1)?.run(Input::Bytes(x), [1, 2, 2, 16], Output::Floats(y));
    run(&[0; 64], &mut y)?;
    assert!(run(&[0; 63], &mut y).is_err() && run(&[0; 64], &mut y[1..]).is_err());
    let conv = conv(1)?.into_bytes(INPUT);
    assert!(conv.run(Input::Bytes(&[0; 64]), [1, 2, 2, 16], Output::Floats(&mut y)).is_err());
    assert!(Int8Weight::quantise(&[f32::NAN; 4], [1, 4, 1, 1]).is_err());
    assert!(Int8Weight::quantise(&[1.0; 3], [1, 4, 1, 1]).is_err());
    assert!(Int8Weight::new([1, 1, 1, 1], vec![-128], vec![1.0]).is_err());
    assert!(Int8Weight::new([1, 1, 1, 1], vec![1], vec![0.0]).is_err());
    Ok(())
}

#[test]
fn results_beyond_the_bytes_are_the_nearest_byte() -> Result<()> {
    let weight = Int8Weight::quantise(&[1.0; 20 * 8], [20, 8, 1, 1])?;
    let factors = [-1e30, -1e5, -1.0, 1.0, 1e5, 1e30].repeat(4);
    let (scale, shift) = (&factors[..20], &[0.0; 20][..]);
    let conv = Int8Conv::new(&weight, ConvConfig::default(), INPUT)?.followed_by([scale, shift], None);
    let conv = conv.into_bytes(Affine::new(1.0, 100)?);
    let mut y = vec![0; 20];
    conv.run(Input::Bytes(&[200; 8]), [1, 1, 1, 8], Output::Bytes(&mut y))?;
    let near = (8.0 * INPUT.value(200)).round() as u8;
    let expected = [0, 0, 100 - near, 100 + near, 255, 255].repeat(4);
    assert_eq!(y, expected[..20]);
    Ok(())
}

//! The fused margin loss against its composition, numeric gradients, and itself on other numbers of threads.

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use maskinv::losses::{MarginConfig, MarginGradient, MarginKind, PlusMatching, cosines};
use maskinv::ops::margin_loss::{Rows, margin_loss_with_gradients};
use maskinv::testing::{Tol, assert_close, fill, gradcheck};

use crate::margin_reference::{cross_entropy, logits};

const KINDS: [MarginKind; 6] = [
    MarginKind::ArcFace,
    MarginKind::CosFace,
    MarginKind::ElasticArc,
    MarginKind::ElasticCos,
    MarginKind::ElasticArcPlus,
    MarginKind::ElasticCosPlus,
];

/// Every loss with every gradient and matching.
fn configs() -> Vec<MarginConfig> {
    let mut configs = Vec::new();
    for kind in KINDS {
        for gradient in [MarginGradient::True, MarginGradient::StraightThrough] {
            for plus_matching in [PlusMatching::Ranked, PlusMatching::Reference] {
                configs.push(MarginConfig { kind, gradient, plus_matching, ..MarginConfig::default() });
            }
        }
    }
    configs
}

/// Labels all over the classes; every fifth row has none.
fn labels(n: usize, k: usize) -> Vec<i64> {
    (0..n).map(|i| if i % 5 == 3 { -1 } else { (i * 7919 + k / 2) as i64 % k as i64 }).collect()
}

fn args(n: usize, d: usize, k: usize, dtype: DType) -> Result<[Var; 2]> {
    let var = |name, dims: &[usize]| Var::from_tensor(&fill(name, dims, -1.0, 1.0)?.to_dtype(dtype)?);
    Ok([var("e", &[n, d])?, var("w", &[d, k])?])
}

/// The loss and both gradients.
fn run([e, w]: &[Var; 2], f: impl Fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>) -> Result<[Tensor; 3]> {
    let loss = f(e, w)?;
    let grads = loss.backward()?;
    Ok([loss, grads.get(e).unwrap().clone(), grads.get(w).unwrap().clone()])
}

fn composed(config: &MarginConfig, e: &Tensor, w: &Tensor, labels: &[i64], m: &[f64]) -> candle_core::Result<Tensor> {
    cross_entropy(&logits(config, &cosines(e, w)?, labels, m)?, labels)
}

fn numbers(tensors: &[Tensor]) -> Result<Vec<f32>> {
    let read = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
    Ok(tensors.iter().map(read).collect::<candle_core::Result<Vec<_>>>()?.concat())
}

#[test]
fn the_margin_loss_is_its_composition() -> Result<()> {
    // One, odd, a strip, a block and around it, several parts.
    for (n, d, k) in [(1, 1, 1), (1, 5, 9), (7, 6, 33), (3, 13, 128), (5, 24, 129), (37, 17, 300), (6, 4, 8_500)] {
        let args = args(n, d, k, DType::F64)?;
        let labels = labels(n, k);
        for config in configs() {
            let margins = fill("m", &[n], config.mean() - 0.1, config.mean() + 0.1)?.to_vec1()?;
            let found = run(&args, |e, w| config.loss(e, w, &labels, &margins))?;
            let expected = run(&args, |e, w| composed(&config, e, w, &labels, &margins))?;
            for ((found, expected), what) in found.iter().zip(&expected).zip(["loss", "grad e", "grad w"]) {
                assert_close(&format!("{what} at {n} {d} {k}, {config:?}"), found, expected, Tol::F64)?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_loss_with_gradients_is_the_graphs_to_the_bit() -> Result<()> {
    for config in configs() {
        for (n, d, k) in [(7, 20, 131), (64, 512, 1000)] {
            let (args, labels) = (args(n, d, k, DType::F32)?, labels(n, k));
            let margins = fill("m", &[n], config.mean() - 0.1, config.mean() + 0.1)?.to_vec1()?;
            let [loss, of_e, of_w] = run(&args, |e, w| config.loss(e, w, &labels, &margins)? * 0.5)?;
            let [e, w] = args.map(|arg| numbers(&[arg.as_tensor().clone()]));
            let (e, w, rows) = (e?, w?, Rows { labels: &labels, margins: &margins });
            let mut of_kernel = vec![f32::NAN; w.len()];
            let found = margin_loss_with_gradients(&e, &w, rows, config.op(), 0.5, &mut of_kernel)?;
            assert_eq!(0.5 * found.loss as f32, loss.to_scalar::<f32>()?);
            assert!(found.of_embeddings == numbers(&[of_e])? && of_kernel == numbers(&[of_w])?, "{config:?}");
            let known =
                found.target_cosines.iter().zip(&labels).all(|(cosine, label)| cosine.is_some() == (*label >= 0));
            assert!(known && found.target_cosines.iter().flatten().all(|cosine| cosine.abs() <= 1.0));
            let few = Rows { labels: &labels, margins: &margins[1..] };
            assert!(margin_loss_with_gradients(&e, &w, few, config.op(), 0.5, &mut of_kernel).is_err());
        }
    }
    Ok(())
}

#[test]
fn the_margin_loss_has_numeric_gradients() -> Result<()> {
    for config in configs().iter().filter(|c| c.gradient == MarginGradient::True) {
        let args = args(5, 6, 131, DType::F64)?.map(|var| var.as_tensor().clone());
        let margins = fill("m", &[5], config.mean() - 0.1, config.mean() + 0.1)?.to_vec1()?;
        let config = MarginConfig { scale: 8.0, ..config.clone() };
        gradcheck(|a| config.loss(&a[0], &a[1], &labels(5, 131), &margins), &args, 1e-6, Tol::GRAD)?;
    }
    Ok(())
}

#[test]
fn the_margin_loss_in_f32_is_that_in_f64() -> Result<()> {
    let (n, d, k) = (64, 512, 3001);
    let (labels, config) = (labels(n, k), MarginConfig::default());
    let margins = fill("m", &[n], 0.4, 0.6)?.to_vec1()?;
    let run = |dtype| run(&args(n, d, k, dtype)?, |e, w| config.loss(e, w, &labels, &margins));
    let [found, expected] = [run(DType::F32)?, run(DType::F64)?];
    assert_close("loss", &found[0], &expected[0], Tol::F32)?;
    // A softmax of logits up to 64 knows its values to 64 * 2^-24 of themselves; the largest gradients are near 0.05.
    for (found, expected) in found[1..].iter().zip(&expected[1..]) {
        let largest = expected.abs()?.max_all()?.to_scalar::<f64>()?;
        assert!(largest > 1e-2, "{largest}");
        assert_close("gradient", found, expected, Tol { abs: 1e-5 * largest, rel: 1e-4 })?;
    }
    Ok(())
}

#[test]
fn the_margin_loss_does_not_depend_on_the_number_of_threads() -> Result<()> {
    let (labels, config) = (labels(9, 9001), MarginConfig::default());
    let once = || -> Result<Vec<f32>> {
        numbers(&run(&args(9, 40, 9001, DType::F32)?, |e, w| config.loss(e, w, &labels, &[0.5; 9]))?)
    };
    let in_pool =
        |threads| -> Result<_> { rayon::ThreadPoolBuilder::new().num_threads(threads).build()?.install(once) };
    let one: Vec<f32> = in_pool(1)?;
    assert!(one == in_pool(2)? && one == in_pool(5)?);
    Ok(())
}

#[test]
fn graphs_alive_at_once_keep_their_own_cosines() -> Result<()> {
    let config = MarginConfig::default();
    let make = |n: usize| args(n, 8, 200, DType::F32);
    let loss = |[e, w]: &[Var; 2], n: usize| config.loss(e, w, &labels(n, 200), &vec![0.5; n]);
    let (a, b) = (make(4)?, make(6)?);
    let (loss_a, loss_b) = (loss(&a, 4)?, loss(&b, 6)?);
    let grads = |loss: &Tensor, args: &[Var; 2]| -> Result<Vec<f32>> {
        let grads = loss.backward()?;
        numbers(&args.each_ref().map(|arg| grads.get(arg).unwrap().clone()))
    };
    let first = grads(&loss_a, &a)?;
    let of_b = grads(&loss_b, &b)?;
    assert!(first == grads(&loss_a, &a)?, "a second backward pass differs");
    assert!(first == grads(&loss(&a, 4)?, &a)? && of_b == grads(&loss(&b, 6)?, &b)?);
    // Weighted, as beside a distillation loss; 2 loses no bit.
    let doubled: Vec<f32> = first.iter().map(|g| 2.0 * g).collect();
    assert!(doubled == grads(&(loss_a * 2.0)?, &a)?);
    Ok(())
}

#[test]
fn the_margin_loss_is_finite_where_cosines_are_one() -> Result<()> {
    for config in configs() {
        let [_, w] = args(1, 16, 140, DType::F32)?;
        let centres = w.t()?.contiguous()?;
        // Embeddings that are centres, their opposites, and nothing; a centre that is nothing.
        let e = Tensor::cat(
            &[
                centres.narrow(0, 0, 8)?,
                centres.narrow(0, 8, 8)?.neg()?,
                Tensor::zeros_like(&centres.narrow(0, 0, 2)?)?,
            ],
            0,
        )?;
        let w =
            Var::from_tensor(&Tensor::cat(&[w.as_tensor(), &Tensor::zeros((16, 1), DType::F32, &Device::Cpu)?], 1)?)?;
        let labels: Vec<i64> = (0..16).chain([140, -1]).collect();
        let all = run(&[Var::from_tensor(&e)?, w], |e, w| config.loss(e, w, &labels, &[0.5; 18]))?;
        assert!(numbers(&all)?.iter().all(|x| x.is_finite()), "{config:?}");
    }
    Ok(())
}

#[test]
fn no_logit_is_too_small_for_the_softmax() -> Result<()> {
    // All cosines but the target's are -1: in f32 exp(-2000) is nothing.
    let e = Var::new(&[[1f32, 0.0]], &Device::Cpu)?;
    let w = Var::from_tensor(&Tensor::cat(
        &[
            Tensor::new(&[[1f32], [0.0]], &Device::Cpu)?,
            Tensor::new(&[[-1f32], [0.0]], &Device::Cpu)?.repeat((1, 299))?,
        ],
        1,
    )?)?;
    let config = MarginConfig { kind: MarginKind::CosFace, scale: 1000.0, ..MarginConfig::default() };
    let all = run(&[e.clone(), w.clone()], |e, w| config.loss(e, w, &[0], &[2.5]))?;
    // log(exp(-1500) + 299 exp(-1000)) + 1500
    let expected = 500.0 + 299f64.ln();
    assert_close("loss", &all[0], &Tensor::new(expected, &Device::Cpu)?, Tol::F32)?;
    assert!(numbers(&all)?.iter().all(|x| x.is_finite()));
    Ok(())
}

#[test]
fn nan_reaches_the_loss() -> Result<()> {
    for config in configs() {
        for (row, element) in [(0, f32::NAN), (2, f32::INFINITY)] {
            let [e, w] = args(3, 4, 150, DType::F32)?;
            let mut values = e.to_vec2::<f32>()?;
            values[row][1] = element;
            let e = Tensor::new(values, &Device::Cpu)?;
            let loss = config.loss(&e, &w, &[0, -1, 149], &[0.5; 3])?.to_scalar::<f32>()?;
            assert!(loss.is_nan(), "{loss} {config:?}");
        }
    }
    let [e, w] = args(3, 4, 150, DType::F32)?;
    let mut values = w.to_vec2::<f32>()?;
    values[2][140] = f32::NAN;
    let loss = MarginConfig::default().loss(&e, &Tensor::new(values, &Device::Cpu)?, &[0, 1, -1], &[0.5; 3])?;
    assert!(loss.to_scalar::<f32>()?.is_nan());
    Ok(())
}

#[test]
fn rows_without_a_label_do_not_count() -> Result<()> {
    let config = MarginConfig::default();
    let all = run(&args(3, 4, 150, DType::F32)?, |e, w| config.loss(e, w, &[-1; 3], &[0.5; 3]))?;
    assert!(numbers(&all)?.iter().all(|&x| x == 0.0));
    Ok(())
}

#[test]
fn what_does_not_fit_a_margin_loss_is_refused() -> Result<()> {
    let [e, w] = args(3, 4, 150, DType::F32)?;
    let config = MarginConfig::default();
    let refused = |result: candle_core::Result<Tensor>, words: &str| {
        let error = result.map(drop).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    refused(config.loss(&e, &w, &[0, 1, 150], &[0.5; 3]), "row 2: expected a label below 150 or -1, found 150");
    refused(config.loss(&e, &w, &[0, -2, 1], &[0.5; 3]), "row 1: expected a label below 150 or -1, found -2");
    refused(config.loss(&e, &w, &[0, 1], &[0.5; 2]), "3 rows, but 2 labels and 2 margins");
    refused(config.loss(&e, &w, &[0, 1, 2], &[0.5; 2]), "3 rows, but 3 labels and 2 margins");
    refused(config.loss(&e, &w.t()?, &[0, 1, 2], &[0.5; 3]), "do not fit");
    refused(config.loss(&e, &w.to_dtype(DType::F64)?, &[0, 1, 2], &[0.5; 3]), "dtype");
    let f16 = |x: &Var| x.to_dtype(DType::F16);
    refused(config.loss(&f16(&e)?, &f16(&w)?, &[0, 1, 2], &[0.5; 3]), "expected f32 or f64");
    Ok(())
}

#[test]
fn views_are_read_as_what_they_show() -> Result<()> {
    let [e, w] = args(4, 6, 140, DType::F32)?;
    let config = MarginConfig::default();
    let loss = |e: &Tensor, w: &Tensor| config.loss(e, w, &[0, 5, 3, 139], &[0.5; 4])?.to_scalar::<f32>();
    let expected = loss(&e, &w)?;
    assert_eq!(loss(&e.t()?.contiguous()?.t()?, &w.t()?.contiguous()?.t()?)?, expected);
    let (wide, deep) =
        (Tensor::cat(&[e.as_tensor(), e.as_tensor()], 0)?, Tensor::cat(&[w.as_tensor(), w.as_tensor()], 0)?);
    assert_eq!(loss(&wide.narrow(0, 4, 4)?, &deep.narrow(0, 6, 6)?)?, expected);
    Ok(())
}

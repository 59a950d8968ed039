//! Every op against its composed reference and numeric gradients, and the candle ops that we lean on.

use anyhow::Result;
use candle_core::{DType, Device, Tensor, Var};
use maskinv::nn::{Graph, Init, Layer, Op, Params};
use maskinv::ops::batch_norm::{Stats, StatsOrigin, batch_norm, batch_norm_reference, batch_stats};
use maskinv::ops::conv::{ConvConfig, conv2d, conv2d_reference};
use maskinv::ops::normalize::l2_normalize;
use maskinv::ops::pool::Window;
use maskinv::ops::prelu::{prelu, prelu_reference};
use maskinv::testing::{Tol, assert_close, fill, gradcheck};

use crate::fixture::Fixture;

/// `(n, h, w, c_in, c_out, kernel, config)`: sizes of one, odd ones, above one tile, strides, groups, real ones.
const CONVS: &[(usize, usize, usize, usize, usize, usize, ConvConfig)] = &[
    (1, 1, 1, 1, 1, 1, ConvConfig { stride: 1, padding: 0, groups: 1 }),
    (2, 5, 7, 3, 5, 3, ConvConfig { stride: 1, padding: 1, groups: 1 }),
    (2, 5, 7, 3, 5, 3, ConvConfig { stride: 2, padding: 1, groups: 1 }),
    (1, 6, 6, 4, 3, 1, ConvConfig { stride: 2, padding: 0, groups: 1 }),
    (2, 4, 5, 2, 3, 3, ConvConfig { stride: 1, padding: 0, groups: 1 }),
    (1, 3, 3, 2, 2, 3, ConvConfig { stride: 1, padding: 3, groups: 1 }),
    (1, 4, 3, 2, 3, 2, ConvConfig { stride: 3, padding: 1, groups: 1 }),
    (2, 5, 4, 6, 6, 3, ConvConfig { stride: 1, padding: 1, groups: 6 }),
    (2, 5, 6, 6, 6, 3, ConvConfig { stride: 2, padding: 1, groups: 6 }),
    (2, 5, 4, 6, 6, 3, ConvConfig { stride: 1, padding: 1, groups: 3 }),
    (1, 4, 4, 4, 8, 3, ConvConfig { stride: 1, padding: 1, groups: 4 }),
    (2, 3, 3, 5, 5, 3, ConvConfig { stride: 1, padding: 0, groups: 5 }),
];

fn conv_args(
    n: usize,
    h: usize,
    w: usize,
    c_in: usize,
    c_out: usize,
    kernel: usize,
    groups: usize,
) -> Result<[Tensor; 2]> {
    let x = fill("x", &[n, h, w, c_in], -1.0, 1.0)?;
    let weight = fill("w", &[c_out, c_in / groups, kernel, kernel], -1.0, 1.0)?;
    Ok([x, weight])
}

#[test]
fn conv2d_matches_candle_and_numeric_gradients() -> Result<()> {
    for &(n, h, w, c_in, c_out, kernel, config) in CONVS {
        let args = conv_args(n, h, w, c_in, c_out, kernel, config.groups)?;
        let what = format!("{n}x{h}x{w} {c_in}->{c_out} {kernel} {config:?}");
        let expected = conv2d_reference(&args[0], &args[1], config)?;
        assert_close(&what, &conv2d(&args[0], &args[1], config)?, &expected, Tol::F64)?;
        // Linear in each argument: a step of 1 is exact.
        gradcheck(|a| conv2d(&a[0], &a[1], config), &args, 1.0, Tol::F64).map_err(|e| e.context(what))?;
    }
    Ok(())
}

#[test]
fn conv2d_in_f32_matches_f64_at_sizes_above_one_tile() -> Result<()> {
    for (c_in, c_out, side, config) in [
        (3, 64, 112, ConvConfig { stride: 1, padding: 1, groups: 1 }),
        (64, 128, 28, ConvConfig { stride: 2, padding: 1, groups: 1 }),
        (128, 128, 28, ConvConfig { stride: 1, padding: 1, groups: 1 }),
        (512, 512, 7, ConvConfig { stride: 1, padding: 1, groups: 1 }),
        (128, 128, 28, ConvConfig { stride: 1, padding: 1, groups: 128 }),
        (128, 128, 28, ConvConfig { stride: 1, padding: 1, groups: 64 }),
    ] {
        let [x, w] = conv_args(2, side, side, c_in, c_out, 3, config.groups)?;
        let run = |dtype| -> Result<[Tensor; 3]> {
            let (x, w) = (Var::from_tensor(&x.to_dtype(dtype)?)?, Var::from_tensor(&w.to_dtype(dtype)?)?);
            let y = conv2d(&x, &w, config)?;
            let gy = fill("gy", y.dims(), -1.0, 1.0)?.to_dtype(dtype)?;
            let grads = (&y * gy)?.sum_all()?.backward()?;
            Ok([y, grads.get(&x).unwrap().clone(), grads.get(&w).unwrap().clone()])
        };
        for ((a, b), what) in run(DType::F32)?.iter().zip(&run(DType::F64)?).zip(["y", "gx", "gw"]) {
            // Sums of up to 25,088 products of numbers in [-1, 1].
            assert_close(&format!("{c_in}->{c_out} {what}"), a, b, Tol { abs: 2e-3, rel: 1e-4 })?;
        }
    }
    Ok(())
}

#[test]
fn conv2d_does_not_depend_on_the_number_of_threads() -> Result<()> {
    let config = ConvConfig { stride: 1, padding: 1, groups: 1 };
    let run = || -> Result<Vec<f32>> {
        let [x, w] = conv_args(3, 28, 28, 64, 64, 3, 1)?;
        let (x, w) = (Var::from_tensor(&x.to_dtype(DType::F32)?)?, Var::from_tensor(&w.to_dtype(DType::F32)?)?);
        let grads = conv2d(&x, &w, config)?.sqr()?.sum_all()?.backward()?;
        let mut all: Vec<f32> = grads.get(&w).unwrap().flatten_all()?.to_vec1()?;
        all.extend(grads.get(&x).unwrap().flatten_all()?.to_vec1::<f32>()?);
        Ok(all)
    };
    let in_pool =
        |threads| -> Result<Vec<f32>> { rayon::ThreadPoolBuilder::new().num_threads(threads).build()?.install(run) };
    let one = in_pool(1)?;
    assert!(one == in_pool(2)? && one == in_pool(5)?);
    Ok(())
}

#[test]
fn conv2d_refuses_what_does_not_fit() -> Result<()> {
    let [x, w] = conv_args(1, 4, 4, 6, 6, 3, 2)?;
    for (config, words) in [
        (ConvConfig::default(), "in 1 groups"),
        (ConvConfig { groups: 0, ..Default::default() }, "must be positive"),
        (ConvConfig { groups: 2, stride: 0, ..Default::default() }, "must be positive"),
    ] {
        let error = conv2d(&x, &w, config).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    let small = fill("x", &[1, 2, 2, 6], -1.0, 1.0)?;
    let error = conv2d(&small, &w, ConvConfig { groups: 2, ..Default::default() }).unwrap_err().to_string();
    assert!(error.contains("smaller than the kernel"), "{error}");
    Ok(())
}

#[test]
fn batch_norm_matches_its_reference_and_numeric_gradients() -> Result<()> {
    for dims in [&[2, 1][..], &[3, 4, 5, 2], &[7, 3], &[5000, 7]] {
        let c = dims[dims.len() - 1];
        let x = (fill("x", dims, -1.0, 1.0)? + 3.0)?;
        let (w, b) = (fill("w", &[c], 0.5, 1.5)?, fill("b", &[c], -1.0, 1.0)?);
        let run = |a: &[Tensor]| batch_norm(&a[0], &a[1], &a[2], &batch_stats(&a[0])?, StatsOrigin::Batch, 1e-5);
        let args = [x, w, b];
        let of_batch = (&batch_stats(&args[0])?, StatsOrigin::Batch);
        let expected = batch_norm_reference(&args[0], &args[1], &args[2], of_batch, 1e-5)?;
        assert_close("forward", &run(&args)?, &expected, Tol::F64)?;
        if args[0].elem_count() <= 200 {
            gradcheck(run, &args, 1e-5, Tol::GRAD)?;
        }
    }
    Ok(())
}

#[test]
fn batch_norm_with_running_statistics_has_numeric_gradients() -> Result<()> {
    let stats = Stats { mean: vec![0.5, -1.0, 2.0], var: vec![0.3, 2.0, 1.0] };
    let args = [fill("x", &[4, 3], -1.0, 1.0)?, fill("w", &[3], 0.5, 1.5)?, fill("b", &[3], -1.0, 1.0)?];
    let run = |a: &[Tensor]| batch_norm(&a[0], &a[1], &a[2], &stats, StatsOrigin::Running, 1e-5);
    gradcheck(run, &args, 1e-5, Tol::GRAD)?;
    let expected = batch_norm_reference(&args[0], &args[1], &args[2], (&stats, StatsOrigin::Running), 1e-5)?;
    assert_close("forward", &run(&args)?, &expected, Tol::F64)?;
    Ok(())
}

#[test]
fn batch_stats_in_f32_survive_a_mean_far_from_zero() -> Result<()> {
    let x = (fill("x", &[100_000, 3], -1.0, 1.0)? + 1000.0)?.to_dtype(DType::F32)?;
    let (found, expected) = (batch_stats(&x)?, batch_stats(&x.to_dtype(DType::F64)?)?);
    for c in 0..3 {
        assert!((found.mean[c] - expected.mean[c]).abs() <= 1e-3, "{found:?}");
        assert!((found.var[c] / expected.var[c] - 1.0).abs() <= 1e-3, "{found:?}");
        assert!((expected.var[c] - 1.0 / 3.0).abs() <= 1e-2);
    }
    Ok(())
}

#[test]
fn prelu_matches_its_reference_and_numeric_gradients() -> Result<()> {
    for dims in [&[1, 1][..], &[2, 3, 4, 5], &[3000, 7]] {
        let args = [fill("x", dims, -1.0, 1.0)?, fill("a", &dims[dims.len() - 1..], 0.1, 0.4)?];
        assert_close("forward", &prelu(&args[0], &args[1])?, &prelu_reference(&args[0], &args[1])?, Tol::F64)?;
        if args[0].elem_count() <= 200 {
            gradcheck(|a| prelu(&a[0], &a[1]), &args, 1e-6, Tol::GRAD)?;
        }
    }
    Ok(())
}

/// A graph of one operation.
fn single(op: Op) -> Graph {
    let mut graph = Graph::new();
    graph.push(op, "", &[Graph::INPUT]);
    graph
}

/// Compares the result of a graph for images `x: (N, C, H, W)` and its gradients for `gy = fill("gy")` with PyTorch's.
fn is_pytorchs(fixture: &Fixture, what: &str, graph: &Graph, params: &Params, x: &Tensor) -> Result<()> {
    let x = Var::from_tensor(x)?;
    let y = graph.forward_t(params, &x, true)?.permute((0, 3, 1, 2))?;
    assert_close(what, &y, fixture.tensor(&format!("{what}.y"))?, Tol::F64)?;
    let gradients = (&y * fill("gy", y.dims(), -1.0, 1.0)?)?.sum_all()?.backward()?;
    let gradient = |of: &Tensor| gradients.get(of).expect("it has a gradient").clone();
    assert_close(what, &gradient(&x), fixture.tensor(&format!("{what}.gx"))?, Tol::F64)?;
    for (_, weight) in params.trainable() {
        assert_close(what, &gradient(weight), fixture.tensor(&format!("{what}.gw"))?, Tol::F64)?;
    }
    Ok(())
}

#[test]
fn max_pooling_upsampling_and_concatenation_are_pytorchs() -> Result<()> {
    let (fixture, none) = (Fixture::load("maps")?, Params::new(DType::F64, &Device::Cpu, 0));
    let windows: Vec<([usize; 4], [usize; 3])> = fixture.json("max_pool")?;
    for (i, (shape, [size, stride, padding])) in windows.into_iter().enumerate() {
        let x = (fill("x", &shape, -1.0, 1.0)? * 4.0)?.round()?;
        let graph = single(Op::MaxPool(Window { size, stride, padding }));
        is_pytorchs(&fixture, &format!("max_pool.{i}"), &graph, &none, &x)?;
    }
    for factor in [2, 3] {
        let x = fill("x", &[2, 3, 4, 5], -1.0, 1.0)?;
        is_pytorchs(&fixture, &format!("upsample.{factor}"), &single(Op::Upsample { factor }), &none, &x)?;
    }
    let (mut graph, mut params) = (Graph::new(), Params::new(DType::F64, &Device::Cpu, 0));
    let (pool, up) = (Op::MaxPool(Window { size: 3, stride: 2, padding: 1 }), Op::Upsample { factor: 2 });
    let coarse = graph.push(pool.clone(), "", &[Graph::INPUT]);
    let coarse = graph.push(Op::Relu, "", &[coarse]);
    let coarse = graph.push(up.clone(), "", &[coarse]);
    let fine = graph.push(up, "", &[Graph::INPUT]);
    let fine = graph.push(pool, "", &[fine]);
    let all = graph.push(Op::Concat, "", &[Graph::INPUT, coarse, fine]);
    graph.chain(all, [Layer::conv2d([9, 4], 1, ConvConfig::default(), Init::Const(0.0), params.root())?]);
    params.load(&[("weight".to_owned(), fill("w", &[4, 9, 1, 1], -1.0, 1.0)?)].into())?;
    is_pytorchs(&fixture, "pyramid", &graph, &params, &fill("x", &[2, 3, 6, 6], -1.0, 1.0)?)
}

#[test]
fn max_pooling_and_upsampling_have_numeric_gradients() -> Result<()> {
    let params = Params::new(DType::F64, &Device::Cpu, 0);
    for (dims, [size, stride, padding]) in [([2, 3, 4, 6], [2, 2, 0]), ([1, 2, 7, 5], [3, 2, 1])] {
        let x = fill("x", &dims, -1.0, 1.0)?;
        for op in [Op::MaxPool(Window { size, stride, padding }), Op::Upsample { factor: 2 }] {
            let graph = single(op);
            gradcheck(|x| graph.forward_t(&params, &x[0], true), std::slice::from_ref(&x), 1e-6, Tol::GRAD)?;
        }
    }
    Ok(())
}

#[test]
fn l2_normalize_has_numeric_gradients_and_keeps_zero_vectors() -> Result<()> {
    let x = fill("x", &[3, 4], -1.0, 1.0)?;
    for dim in [0, 1] {
        gradcheck(|a| l2_normalize(&a[0], dim), std::slice::from_ref(&x), 1e-6, Tol::GRAD)?;
    }
    let zero = Var::zeros((2, 3), DType::F32, &Device::Cpu)?;
    let y = l2_normalize(&zero, 1)?;
    let grads = y.sum_all()?.backward()?;
    assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [0.0; 6]);
    assert!(grads.get(&zero).unwrap().flatten_all()?.to_vec1::<f32>()?.iter().all(|g| g.is_finite()));
    Ok(())
}

/// Our own code relies on these of candle's; re-checked here on every upgrade.
#[test]
fn the_candle_ops_we_lean_on_have_numeric_gradients() -> Result<()> {
    let (a, b) = (fill("a", &[3, 4], 0.2, 1.0)?, fill("b", &[4, 2], -1.0, 1.0)?);
    gradcheck(|a| a[0].matmul(&a[1]), &[a.clone(), b], 1.0, Tol::F64)?;
    gradcheck(|a| candle_nn::ops::sigmoid(&a[0]), std::slice::from_ref(&a), 1e-6, Tol::GRAD)?;
    gradcheck(|a| a[0].sqr()?.sum_keepdim(1)?.sqrt(), std::slice::from_ref(&a), 1e-6, Tol::GRAD)?;
    gradcheck(|a| a[0].broadcast_div(&a[1]), &[a.clone(), fill("c", &[3, 1], 0.5, 1.0)?], 1e-6, Tol::GRAD)?;
    gradcheck(|a| a[0].reshape((2, 6))?.permute((1, 0))?.mean(1), &[a], 1.0, Tol::F64)?;
    Ok(())
}

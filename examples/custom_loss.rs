//! Trains with a custom loss on the public API: supervised contrastive learning (Khosla et al., NeurIPS 2020, eq. 2) on
//! masked and clean faces.
//!
//! ```sh
//! cargo run --release --example custom_loss -- [STEPS]
//! ```
//! The loss is a function of the embeddings. candle differentiates it, and the network's backward pass continues from
//! the gradient of the embeddings.

use anyhow::{Context, Result};
use candle_core::{D, DType, Device, Tensor, Var};
use maskinv::data::{Loader, Transform};
use maskinv::eval::{Setting, evaluate};
use maskinv::models::Model;
use maskinv::nn::engine::Activations;
use maskinv::ops::normalize::l2_normalize;
use maskinv::optim::Optimizer;
use maskinv::train::preset;

const TEMPERATURE: f64 = 0.2;

/// Returns the supervised contrastive loss, a scalar: for each image, the mean of `-log softmax(cosine / TEMPERATURE)`
/// over the other images of the same person, averaged over the images that have one. The softmax is over all other
/// images. `embedding`: `(N, d)`, f32; `labels`: `N`.
fn contrastive_loss(embedding: &Tensor, labels: &[i64]) -> candle_core::Result<Tensor> {
    let n = labels.len();
    let e = l2_normalize(embedding, 1)?;
    let others = (1.0 - Tensor::eye(n, DType::F32, &Device::Cpu)?)?;
    // Removes each image's cosine with itself from the softmax: exp(-1e4) is 0.
    let logits = ((e.matmul(&e.t()?)? / TEMPERATURE)? + ((&others - 1.0)? * 1e4)?)?;
    let highest = logits.max_keepdim(D::Minus1)?.detach();
    let shifted = logits.broadcast_sub(&highest)?;
    let log_share = shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)?;
    let label = Tensor::new(labels, &Device::Cpu)?;
    let same = label.reshape((n, 1))?.broadcast_eq(&label.reshape((1, n))?)?.to_dtype(DType::F32)?;
    let positives = (same * others)?;
    let num_positives = positives.sum_keepdim(D::Minus1)?;
    let of_image = ((log_share * positives)?.sum_keepdim(D::Minus1)? / num_positives.maximum(1f32)?)?;
    let num_images = f64::from(num_positives.minimum(1f32)?.sum_all()?.to_scalar::<f32>()?);
    of_image.sum_all()?.neg()? / num_images.max(1.0)
}

fn main() -> Result<()> {
    let num_steps: usize =
        std::env::args().nth(1).map_or(Ok(300), |n| n.parse()).context("STEPS: expected a number")?;
    let mut config = preset("procedural")?;
    // Few identities, so that a batch has several images of each person.
    config.set("data.procedural.num_identities=24")?;
    let model = Model::new(&config.model, &Device::Cpu, 0)?;
    let transform = Transform::new(&config.augment, &config.mask)?;
    let loader = Loader::new(config.data.open_train()?, transform, &config.loader, config.model.input_size, 0)?;
    let preprocessing = model.preprocessing().clone();
    let mut student = model.into_training(Activations::Kept)?;
    let mut optimizer = Optimizer::new(&config.optim, &student)?;
    for (step, batch) in (0..).flat_map(|epoch| loader.epoch(epoch)).take(num_steps).enumerate() {
        let batch = batch?;
        let images = batch.student.to_tensor(&preprocessing, &Device::Cpu)?;
        let (embedding, recorded) = student.record(&images)?;
        let embedding = Var::from_tensor(&embedding)?;
        let loss = contrastive_loss(&embedding, &batch.labels)?;
        recorded.backward(loss.backward()?.get(&embedding).context("the loss has a gradient")?)?;
        optimizer.step(&mut student, 0.05)?;
        if step % 20 == 0 || step + 1 == num_steps {
            println!("step {step}: loss {:.3}", loss.to_scalar::<f32>()?);
        }
    }
    let evaluation = evaluate(&student.model()?, &config.data.open_test()?, &config.eval, |_, _| {})?;
    let eer = |setting| -> Result<f64> {
        Ok(100.0 * evaluation.get(setting).context("the test set has pairs of each setting")?.metrics.eer)
    };
    println!("EER of unseen people: U-U {:.2} %, U-M {:.2} %", eer(Setting::UU)?, eer(Setting::UM)?);
    Ok(())
}

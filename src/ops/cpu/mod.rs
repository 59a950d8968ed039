//! The CPU as a [`Backend`].

mod images;
mod kernels;
mod memory;

use std::borrow::Cow;
use std::ops::Range;

use candle_core::{Result, bail};

pub use images::CpuImages;

use super::adamw::{AdamWStep, adamw_step};
use super::backend::{Backend, GuardState, MarginLoss, Order, Update};
use super::centres::{self, pull_centres};
use super::distance::{DistillKind, distance_with_gradient};
use super::linear;
use super::margin_loss::{self, MarginTask};
use super::sgd::{SgdStep, sgd_step};
use super::update::{each_pair, sum_of_squares};
use crate::dist::{Collective, HostBucket, Ranks};

/// The CPU.
#[derive(Clone, Copy, Debug)]
pub struct Cpu;

/// What was measured of a step on the CPU.
#[derive(Clone, Copy, Debug)]
pub struct Guard {
    state: GuardState,
    clip_scale: f64,
}

impl Guard {
    /// Factor of the gradients in an update.
    fn scale(&self, is_clipped: bool) -> f64 {
        if is_clipped { self.clip_scale } else { 1.0 }
    }
}

/// Returns the factor that scales gradients of norm `norm` to at most `max_norm`: PyTorch's
/// `min(1, max_norm / (norm + 1e-6))`; 1 if `max_norm` is 0.
fn clip_scale(norm: f64, max_norm: f64) -> f64 {
    if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 }
}

impl Backend for Cpu {
    type Array = Vec<f32>;
    type Scalar = f64;
    type Guard = Guard;
    type Bucket = HostBucket;

    const IS_SYNCHRONOUS: bool = true;
    const ALIGNMENT: usize = 1;

    /// From outside the pool, every parallel loop would wake the workers and put this thread to sleep.
    fn enter<R: Send>(work: impl FnOnce() -> R + Send) -> R {
        let mut result = None;
        rayon::scope(|_| result = Some(work()));
        result.expect("the scope has run")
    }

    fn zeros(&self, len: usize) -> Result<Vec<f32>> {
        Ok(vec![0.0; len])
    }

    fn upload(&self, values: Vec<f32>) -> Result<Vec<f32>> {
        Ok(values)
    }

    fn write(&self, y: &mut Vec<f32>, values: &[f32]) -> Result<()> {
        if y.len() != values.len() {
            bail!("expected {} values, found {}", y.len(), values.len());
        }
        y.copy_from_slice(values);
        Ok(())
    }

    fn scalar(&self, value: f64) -> Result<f64> {
        Ok(value)
    }

    fn read<'a>(&self, x: &'a Vec<f32>) -> Result<Cow<'a, [f32]>> {
        Ok(Cow::Borrowed(x))
    }

    fn read_scalar(&self, x: &f64) -> Result<f64> {
        Ok(*x)
    }

    fn short(&self, _x: &Vec<f32>) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }

    fn add(&self, y: &mut Vec<f32>, x: &Vec<f32>) -> Result<()> {
        each_pair(y, x, |y, x| *y += x);
        Ok(())
    }

    fn average(&self, y: &mut Vec<f32>, x: &Vec<f32>, share: f64, guard: &Guard) -> Result<()> {
        if guard.state.is_finite {
            let share = share as f32;
            each_pair(y, x, |y, x| *y += share * (x - *y));
        }
        Ok(())
    }

    fn guard(&self) -> Result<Guard> {
        Ok(Guard { state: GuardState { norm: 0.0, is_finite: true, num_skipped: 0 }, clip_scale: 1.0 })
    }

    fn measure(
        &self,
        guard: &mut Guard,
        grads: &Vec<f32>,
        places: &[Range<usize>],
        max_norm: f64,
        losses: &[(f64, &f64)],
    ) -> Result<()> {
        let norm = places.iter().map(|place| sum_of_squares(&grads[place.clone()])).sum::<f64>().sqrt();
        let loss: f64 = losses.iter().map(|(weight, loss)| weight * **loss).sum();
        let is_finite = norm.is_finite() && loss.is_finite();
        let num_skipped = guard.state.num_skipped + u64::from(!is_finite);
        *guard = Guard { state: GuardState { norm, is_finite, num_skipped }, clip_scale: clip_scale(norm, max_norm) };
        Ok(())
    }

    fn read_guard(&self, guard: &Guard) -> Result<GuardState> {
        Ok(guard.state)
    }

    fn sgd(&self, update: Update<Self>, velocity: &mut Vec<f32>, step: SgdStep) -> Result<()> {
        let Update { values, grads, guard, is_clipped, .. } = update;
        if guard.state.is_finite {
            sgd_step(values, velocity, grads, SgdStep { grad_scale: guard.scale(is_clipped), ..step })?;
        }
        Ok(())
    }

    fn adamw(&self, update: Update<Self>, [mean, square]: [&mut Vec<f32>; 2], step: AdamWStep) -> Result<()> {
        let Update { values, grads, guard, is_clipped, .. } = update;
        if guard.state.is_finite {
            adamw_step(values, [mean, square], grads, AdamWStep { grad_scale: guard.scale(is_clipped), ..step })?;
        }
        Ok(())
    }

    fn check_embedding_size(&self, _size: usize) -> Result<()> {
        Ok(())
    }

    fn centres_order(&self, _size: usize, _classes: usize) -> Order {
        Order::Same
    }

    fn margin_loss(
        &self,
        embeddings: &Vec<f32>,
        centres: &Vec<f32>,
        task: MarginTask,
        of_centres: &mut Vec<f32>,
    ) -> Result<MarginLoss<Self>> {
        let found = margin_loss::with_gradients(embeddings, centres, task, of_centres)?;
        let target_cosines = found.target_cosines.iter().map(|cosine| cosine.unwrap_or(0.0) as f32).collect();
        Ok(MarginLoss { loss: found.loss, of_embeddings: found.of_embeddings, target_cosines })
    }

    fn distance(
        &self,
        student: &Vec<f32>,
        teacher: &Vec<f32>,
        n: usize,
        kind: DistillKind,
        weight: f64,
        row_weights: Option<&[f32]>,
    ) -> Result<(f64, Vec<f32>)> {
        distance_with_gradient(student, teacher, n, kind, weight, row_weights)
    }

    fn pull_centres(
        &self,
        centres: &mut Vec<f32>,
        student: &Vec<f32>,
        teacher: &Vec<f32>,
        labels: &[i64],
    ) -> Result<()> {
        pull_centres(centres, student, teacher, labels)
    }

    fn select_classes(&self, all: &Vec<f32>, size: usize, classes: &[u32]) -> Result<Vec<f32>> {
        centres::select(all, size, classes)
    }

    fn replace_classes(&self, all: &mut Vec<f32>, size: usize, classes: &[u32], by: &Vec<f32>) -> Result<()> {
        centres::replace(all, size, classes, by)
    }

    fn collect(&self, x: &Vec<f32>, how: Collective, ranks: &Ranks) -> crate::Result<Vec<f32>> {
        ranks.collect(x.clone(), how)
    }

    fn average_scalars(&self, numbers: &mut [&mut f64], ranks: &Ranks) -> crate::Result<()> {
        let mut values: Vec<f64> = numbers.iter().map(|number| **number).collect();
        ranks.total(&mut values)?;
        numbers.iter_mut().zip(values).for_each(|(number, sum)| **number = sum / ranks.size() as f64);
        Ok(())
    }

    fn send(&self, grads: &Vec<f32>, ranges: Vec<Range<usize>>, ranks: &Ranks) -> crate::Result<HostBucket> {
        Ok(HostBucket::send(grads, ranges, ranks))
    }

    fn receive(&self, bucket: HostBucket, grads: &mut Vec<f32>) -> crate::Result<()> {
        bucket.receive(grads)
    }

    fn set_part(&self, y: &mut Vec<f32>, elements: Range<usize>, x: &Vec<f32>) -> Result<()> {
        let len = y.len();
        match y.get_mut(elements.clone()).filter(|part| part.len() == x.len()) {
            Some(part) => part.copy_from_slice(x),
            None => bail!("{} values for {elements:?} of {len}", x.len()),
        }
        Ok(())
    }

    fn part(&self, x: &Vec<f32>, elements: Range<usize>) -> Result<Vec<f32>> {
        let Some(part) = x.get(elements.clone()) else { bail!("{elements:?} of {} elements", x.len()) };
        Ok(part.to_vec())
    }

    fn join(&self, parts: &[&Vec<f32>]) -> Result<Vec<f32>> {
        Ok(parts.iter().flat_map(|part| part.iter().copied()).collect())
    }

    fn linear(&self, x: &Vec<f32>, w: &Vec<f32>, sizes @ [n, _, m]: [usize; 3]) -> Result<Vec<f32>> {
        let mut y = vec![0.0; n * m];
        linear::forward(x, w, None, sizes, &mut y);
        Ok(y)
    }

    fn linear_backward(
        &self,
        x: &Vec<f32>,
        w: &Vec<f32>,
        gy: &Vec<f32>,
        sizes @ [n, k, _]: [usize; 3],
        gw: &mut Vec<f32>,
    ) -> Result<Vec<f32>> {
        linear::grad_w(x, gy, sizes, gw);
        let mut gx = vec![0.0; n * k];
        linear::grad_x(gy, w, sizes, &mut gx);
        Ok(gx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_is_not_finite_changes_nothing_and_is_counted() -> Result<()> {
        let mut guard = Cpu.guard()?;
        for (grads, loss, num_skipped) in
            [([1.0, f32::INFINITY], 1.0, 1), ([1.0, 2.0], f64::NAN, 2), ([3.0, 4.0], 1.0, 2)]
        {
            let (mut values, mut velocity) = (vec![1.0, 2.0], vec![0.5, 0.5]);
            let (mut average, places) = (vec![0.0, 0.0], [0..1, 1..2]);
            Cpu.measure(&mut guard, &grads.to_vec(), &places, 2.5, &[(0.5, &loss)])?;
            let state = Cpu.read_guard(&guard)?;
            let is_finite = grads[1] == 4.0;
            assert_eq!((state.is_finite, state.num_skipped), (is_finite, num_skipped));
            Cpu.average(&mut average, &values, 0.5, &guard)?;
            let update =
                Update { values: &mut values, short: None, grads: &grads.to_vec(), guard: &guard, is_clipped: true };
            let step = SgdStep { lr: 1.0, momentum: 0.0, weight_decay: 0.0, grad_scale: 1.0 };
            Cpu.sgd(update, &mut velocity, step)?;
            match is_finite {
                false => assert_eq!((values, velocity, average), (vec![1.0, 2.0], vec![0.5, 0.5], vec![0.0, 0.0])),
                true => {
                    // A norm of 5 is clipped to half of it.
                    assert!((velocity[0] - 1.5).abs() < 1e-5 && (values[1] - 0.0).abs() < 1e-5, "{velocity:?}");
                    assert_eq!((state.norm, average), (5.0, vec![0.5, 1.0]));
                }
            }
        }
        Ok(())
    }
}

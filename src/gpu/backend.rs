//! A GPU as a [`Backend`].

use std::borrow::Cow;
use std::ops::Range;

use candle_core::{Result, bail};

use super::distill::{distance, pull_centres};
use super::exchange::{self, Bucket};
use super::margin::{Centres, DeviceMarginLoss, DeviceRows, MAX_COSINES};
use super::update::{self, Guard, adamw, sgd};
use super::{Array, Element, GpuBackend, Product, rows};
use crate::dist::{Collective, Ranks};
use crate::ops::adamw::AdamWStep;
use crate::ops::backend::{Backend, GuardState, MarginLoss, Order, Update};
use crate::ops::distance::DistillKind;
use crate::ops::margin_loss::MarginTask;
use crate::ops::sgd::SgdStep;

impl Backend for GpuBackend {
    type Array = Array;
    type Scalar = Array;
    type Guard = Guard;
    type Bucket = Bucket;

    const IS_SYNCHRONOUS: bool = false;
    /// At least 16 bytes in every type.
    const ALIGNMENT: usize = 8;

    fn enter<R: Send>(work: impl FnOnce() -> R + Send) -> R {
        work()
    }

    fn zeros(&self, len: usize) -> Result<Array> {
        self.device.zeros(Element::F32, len)
    }

    fn upload(&self, values: Vec<f32>) -> Result<Array> {
        self.device.upload(&values)
    }

    fn write(&self, y: &mut Array, values: &[f32]) -> Result<()> {
        y.write(values)
    }

    fn scalar(&self, value: f64) -> Result<Array> {
        self.device.upload(&[value as f32])
    }

    fn read<'a>(&self, x: &'a Array) -> Result<Cow<'a, [f32]>> {
        Ok(Cow::Owned(x.read()?))
    }

    fn read_scalar(&self, x: &Array) -> Result<f64> {
        Ok(f64::from(x.read::<f32>()?[0]))
    }

    fn short(&self, x: &Array) -> Result<Option<Array>> {
        (self.element != Element::F32).then(|| rows::in_type(x, self.element)).transpose()
    }

    fn add(&self, y: &mut Array, x: &Array) -> Result<()> {
        update::blend(y, x, [1.0, 1.0], None)
    }

    fn average(&self, y: &mut Array, x: &Array, share: f64, guard: &Guard) -> Result<()> {
        let share = share as f32;
        update::blend(y, x, [1.0 - share, share], Some(guard))
    }

    fn guard(&self) -> Result<Guard> {
        Guard::new(&self.device)
    }

    fn measure(
        &self,
        guard: &mut Guard,
        grads: &Array,
        _places: &[Range<usize>],
        max_norm: f64,
        losses: &[(f64, &Array)],
    ) -> Result<()> {
        let total = self.device.zeros(Element::F32, 1)?;
        losses.iter().try_for_each(|(weight, loss)| update::blend(&total, loss, [1.0, *weight as f32], None))?;
        guard.measure(grads, max_norm as f32, Some(&total))
    }

    fn read_guard(&self, guard: &Guard) -> Result<GuardState> {
        guard.read()
    }

    fn sgd(&self, update: Update<Self>, velocity: &mut Array, step: SgdStep) -> Result<()> {
        sgd(&update, velocity, step)
    }

    fn adamw(&self, update: Update<Self>, [mean, square]: [&mut Array; 2], step: AdamWStep) -> Result<()> {
        adamw(&update, [mean, square], step)
    }

    fn check_embedding_size(&self, size: usize) -> Result<()> {
        if !size.is_multiple_of(8) {
            bail!("the GPU engine needs embedding sizes that are multiples of 8, found {size}: use --device cpu");
        }
        Ok(())
    }

    fn centres_order(&self, size: usize, classes: usize) -> Order {
        Order::transposed(size, classes)
    }

    fn margin_loss(
        &self,
        embeddings: &Array,
        centres: &Array,
        MarginTask { rows, config, weight, ranks }: MarginTask,
        of_centres: &mut Array,
    ) -> Result<MarginLoss<Self>> {
        let n = rows.labels.len();
        rows.check_shared(n, centres.len() * n / embeddings.len().max(1), ranks)?;
        let rows = DeviceRows::new(&self.device, rows, config.matching)?;
        let loss = DeviceMarginLoss { config, element: self.element, max_cosines: MAX_COSINES };
        let centres = Centres { values: centres, ranks };
        loss.with_gradients(embeddings, &centres, &rows, weight as f32, of_centres)
    }

    fn distance(
        &self,
        student: &Array,
        teacher: &Array,
        n: usize,
        kind: DistillKind,
        weight: f64,
        row_weights: Option<&[f32]>,
    ) -> Result<(Array, Array)> {
        distance(student, teacher, n, kind, weight as f32, row_weights)
    }

    fn pull_centres(&self, centres: &mut Array, student: &Array, teacher: &Array, labels: &[i64]) -> Result<()> {
        pull_centres(centres, student, teacher, labels)
    }

    fn select_classes(&self, all: &Array, size: usize, classes: &[u32]) -> Result<Array> {
        rows::select(all, size, classes)
    }

    fn replace_classes(&self, all: &mut Array, size: usize, classes: &[u32], by: &Array) -> Result<()> {
        rows::replace(all, size, classes, by)
    }

    fn collect(&self, x: &Array, how: Collective, ranks: &Ranks) -> crate::Result<Array> {
        exchange::collect(x, how, ranks)
    }

    fn average_scalars(&self, numbers: &mut [&mut Array], ranks: &Ranks) -> crate::Result<()> {
        let all = self.join(&numbers.iter().map(|number| &**number).collect::<Vec<_>>())?;
        exchange::sum_in_place(&all, 1.0 / ranks.size() as f32, ranks)?;
        numbers.iter_mut().enumerate().for_each(|(i, number)| **number = all.part(i, 1));
        Ok(())
    }

    fn send(&self, grads: &Array, ranges: Vec<Range<usize>>, ranks: &Ranks) -> crate::Result<Bucket> {
        Bucket::send(grads, ranges, ranks)
    }

    fn receive(&self, bucket: Bucket, grads: &mut Array) -> crate::Result<()> {
        bucket.receive(self, grads)
    }

    fn set_part(&self, y: &mut Array, elements: Range<usize>, x: &Array) -> Result<()> {
        update::blend(&self.part(y, elements)?, x, [0.0, 1.0], None)
    }

    fn part(&self, x: &Array, elements: Range<usize>) -> Result<Array> {
        if elements.start > elements.end || elements.end > x.len() {
            bail!("{elements:?} of {} elements", x.len());
        }
        Ok(x.part(elements.start, elements.len()))
    }

    fn join(&self, parts: &[&Array]) -> Result<Array> {
        let whole = self.device.array(Element::F32, parts.iter().map(|part| part.len()).sum())?;
        let mut start = 0;
        for part in parts {
            update::blend(&whole.part(start, part.len()), part, [0.0, 1.0], None)?;
            start += part.len();
        }
        Ok(whole)
    }

    fn linear(&self, x: &Array, w: &Array, [n, k, m]: [usize; 3]) -> Result<Array> {
        let y = self.device.array(Element::F32, n * m)?;
        let (a, b, c) = (x.matrix(k), w.matrix(k).transposed(), y.matrix(m));
        self.device.multiply(&Product { m: n, n: m, k, a, b, c, alpha: 1.0, beta: 0.0 })?;
        Ok(y)
    }

    fn linear_backward(
        &self,
        x: &Array,
        w: &Array,
        gy: &Array,
        [n, k, m]: [usize; 3],
        gw: &mut Array,
    ) -> Result<Array> {
        let gx = self.device.array(Element::F32, n * k)?;
        let (a, b, c) = (gy.matrix(m), w.matrix(k), gx.matrix(k));
        self.device.multiply(&Product { m: n, n: k, k: m, a, b, c, alpha: 1.0, beta: 0.0 })?;
        let (a, b, c) = (gy.matrix(m).transposed(), x.matrix(k), gw.matrix(k));
        self.device.multiply(&Product { m, n: k, k: n, a, b, c, alpha: 1.0, beta: 0.0 })?;
        Ok(gx)
    }
}

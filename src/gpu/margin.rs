//! Margin softmax in blocks of classes: `kernels/margin.cu`. Besides the class centres and their gradient, the largest
//! buffers hold one block of classes for all rows.

use candle_core::{Result, bail};

use super::{Arg, Array, Device, Element, GpuBackend, Launch, Product, exchange, fits};
use crate::dist::{Collective, Ranks};
use crate::ops::backend;
use crate::ops::margin_loss::{self, MarginForm, MarginGradient, MarginLossConfig, PlusMatching};

/// Threads per block.
const BLOCK: usize = 256;
/// Columns that a warp takes of a row; a block of classes is a multiple of it.
const COLUMNS: usize = 128;
/// Cosines of a block of classes, as many as the second-level cache of a large GPU holds.
pub(crate) const MAX_COSINES: usize = 4 << 20;
/// Maximum number of chunks of rows with sums of their own per class; the sums' rounding depends on it.
const MAX_CHUNKS: usize = 8;

/// Settings of the loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct DeviceMarginLoss {
    pub config: MarginLossConfig,
    /// Element type of the products' inputs.
    pub element: Element,
    /// Maximum number of cosines held at once; the minimum is [`COLUMNS`] per row.
    pub max_cosines: usize,
}

/// Labels and margins of a batch, on the device.
pub(crate) struct DeviceRows {
    /// Class numbers, i64, `(n)`; -1 for a row without a label.
    labels: Array,
    /// Margins, f32: one per row, or sorted for the "+" losses.
    margins: Array,
    /// Number of each labelled row among the labelled rows, i32, `(n)`.
    positions: Array,
    counted: usize,
}

impl DeviceRows {
    /// Uploads labels and margins. For the "+" losses the margins are sorted, without those of unlabelled rows.
    pub fn new(device: &Device, rows: margin_loss::Rows, matching: Option<PlusMatching>) -> Result<Self> {
        let margin_loss::Rows { labels, margins } = rows;
        let mut positions = Vec::with_capacity(labels.len());
        let mut counted = 0;
        for label in labels {
            positions.push(counted);
            counted += i32::from(*label >= 0);
        }
        let mut given: Vec<f32> = margins.iter().map(|m| *m as f32).collect();
        if matching.is_some() {
            given = given.into_iter().zip(labels).filter(|(_, label)| **label >= 0).map(|(m, _)| m).collect();
            given.sort_by(f32::total_cmp);
        }
        Ok(Self {
            labels: device.upload(labels)?,
            margins: device.upload(&given)?,
            positions: device.upload(&positions)?,
            counted: counted as usize,
        })
    }
}

/// Class centres `(k, d)`, f32, one row per class.
pub(crate) struct Centres<'a> {
    pub values: &'a Array,
    /// Ranks that have the centres of other classes.
    pub ranks: Option<&'a Ranks>,
}

impl Centres<'_> {
    fn of_block(&self, d: usize, (first, num): (usize, usize)) -> Array {
        self.values.part(first * d, num * d)
    }
}

/// Sizes of a pass: rows, embedding length, classes.
#[derive(Clone, Copy)]
struct Sizes {
    n: usize,
    d: usize,
    k: usize,
    /// Classes per block.
    block: usize,
}

impl Sizes {
    /// First class and number of classes of each block.
    fn blocks(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.k).step_by(self.block).map(move |first| (first, self.block.min(self.k - first)))
    }
}

/// Buffers for one block of classes.
struct Memory {
    unit: Array,
    inv_norms: Array,
    /// Cosines, f32, `(n, block)`.
    cosines: Array,
}

impl DeviceMarginLoss {
    /// Returns the loss of embeddings `(n, d)`, f32, with its gradient times `weight`. Writes the gradient of the
    /// class centres to `of_centres`, `(k, d)`, f32.
    pub fn with_gradients(
        &self,
        embeddings: &Array,
        centres: &Centres,
        rows: &DeviceRows,
        weight: f32,
        of_centres: &Array,
    ) -> Result<backend::MarginLoss<GpuBackend>> {
        let (device, sizes) = (embeddings.device(), self.sizes(embeddings, centres, rows, of_centres)?);
        let Sizes { n, d, block, .. } = sizes;
        let unit = device.array(self.element, n * d)?;
        let inv_norms = device.array(Element::F32, n)?;
        unit_rows(embeddings, n, &unit, &inv_norms)?;
        let memory = Memory {
            unit: device.array(self.element, block * d)?,
            inv_norms: device.array(Element::F32, block)?,
            cosines: device.array(Element::F32, n * block)?,
        };
        let targets = device.zeros(Element::F32, n)?;
        let (softmaxes, loss) = self.forward(&unit, centres, rows, sizes, (&memory, &targets))?;
        let factor = self.config.scale as f32 * weight / rows.counted.max(1) as f32;
        let gradient = self.backward(&unit, centres, (rows, &softmaxes), (sizes, factor), &memory, of_centres)?;
        through_unit_rows(embeddings, &inv_norms, None, &gradient)?;
        Ok(backend::MarginLoss { loss, of_embeddings: gradient, target_cosines: targets })
    }

    fn sizes(&self, embeddings: &Array, centres: &Centres, rows: &DeviceRows, of_centres: &Array) -> Result<Sizes> {
        let n = rows.labels.len();
        let d = embeddings.len() / n.max(1);
        let is_whole = n > 0 && d > 0 && d.is_multiple_of(8) && n * d == embeddings.len();
        if !is_whole || !centres.values.len().is_multiple_of(d) || !of_centres.len().is_multiple_of(d) {
            let (of_e, of_w) = (embeddings.len(), centres.values.len());
            bail!("margin: embeddings of {of_e} elements in {n} rows do not fit class centres of {of_w}");
        }
        let arrays = [embeddings, centres.values, of_centres].map(|array| (Some(array), array.len()));
        fits("margin", Element::F32, &arrays)?;
        let expected = if self.config.matching.is_some() { rows.counted } else { n };
        fits("margin", Element::F32, &[(Some(&rows.margins), expected)])?;
        let k = of_centres.len() / d;
        if k == 0 || k != centres.values.len() / d {
            bail!("margin: the gradient has {k} rows, which is not the number of classes");
        }
        let block = (self.max_cosines / n / COLUMNS * COLUMNS).max(COLUMNS).min(k.next_multiple_of(COLUMNS));
        Ok(Sizes { n, d, k, block })
    }

    /// Computes the cosines of a block of classes.
    fn cosines(
        &self,
        embeddings: &Array,
        centres: &Centres,
        sizes: Sizes,
        (first, num): (usize, usize),
        memory: &Memory,
    ) -> Result<()> {
        let Sizes { n, d, block, .. } = sizes;
        unit_rows(&centres.of_block(d, (first, num)), num, &memory.unit, &memory.inv_norms)?;
        embeddings.device().multiply(&Product {
            m: n,
            n: num,
            k: d,
            a: embeddings.matrix(d),
            b: memory.unit.matrix(d).transposed(),
            c: memory.cosines.matrix(block),
            alpha: 1.0,
            beta: 0.0,
        })
    }

    /// Returns the rows' softmaxes and the loss; writes the target cosines.
    fn forward(
        &self,
        embeddings: &Array,
        centres: &Centres,
        rows: &DeviceRows,
        sizes: Sizes,
        (memory, targets): (&Memory, &Array),
    ) -> Result<(Array, Array)> {
        let (device, n) = (embeddings.device(), sizes.n);
        // A maximum and a sum per row and block.
        let parts = device.array(Element::F32, 2 * sizes.blocks().count() * n)?;
        for (i, (first, num)) in sizes.blocks().enumerate() {
            self.cosines(embeddings, centres, sizes, (first, num), memory)?;
            self.softmax(&memory.cosines, (first, num), rows, &parts.part(2 * i * n, 2 * n), targets)?;
        }
        match centres.ranks {
            Some(ranks) => {
                let all = over_ranks(&parts, targets, ranks).map_err(candle_core::Error::wrap)?;
                self.join(&all, targets, rows)
            }
            None => self.join(&parts, targets, rows),
        }
    }

    /// Writes the gradient of the class centres; returns that of the unit embeddings.
    fn backward(
        &self,
        embeddings: &Array,
        centres: &Centres,
        (rows, softmaxes): (&DeviceRows, &Array),
        (sizes, factor): (Sizes, f32),
        memory: &Memory,
        of_centres: &Array,
    ) -> Result<Array> {
        let (device, Sizes { n, d, block, k }) = (embeddings.device(), sizes);
        let of_embeddings = device.array(Element::F32, n * d)?;
        let g = device.array(self.element, n * block)?;
        let sums = Sums { all: device.array(Element::F32, chunks_of(n).1 * block)?, stride: block, factor };
        for (first, num) in sizes.blocks() {
            if k > block {
                // With a single block they are still in memory.
                self.cosines(embeddings, centres, sizes, (first, num), memory)?;
            }
            self.gradient(&memory.cosines, (first, num), (rows, softmaxes), &g, &sums.all)?;
            let of_block = of_centres.part(first * d, num * d);
            device.multiply(&Product {
                m: num,
                n: d,
                k: n,
                a: g.matrix(block).transposed(),
                b: embeddings.matrix(d),
                c: of_block.matrix(d),
                alpha: factor,
                beta: 0.0,
            })?;
            device.multiply(&Product {
                m: n,
                n: d,
                k: num,
                a: g.matrix(block),
                b: memory.unit.matrix(d),
                c: of_embeddings.matrix(d),
                alpha: factor,
                beta: if first == 0 { 0.0 } else { 1.0 },
            })?;
            let from = centres.of_block(d, (first, num));
            through_unit_rows(&from, &memory.inv_norms.part(0, num), Some(&sums), &of_block)?;
        }
        Ok(of_embeddings)
    }

    /// Writes the contribution of a block of cosines `(n, block)`, the classes from `first` on, to the rows' softmaxes:
    /// a maximum and a sum per row. Also writes the cosines of the targets in the block.
    fn softmax(
        &self,
        cosines: &Array,
        (first, num): (usize, usize),
        rows: &DeviceRows,
        parts: &Array,
        targets: &Array,
    ) -> Result<()> {
        let n = rows.labels.len();
        let launch = Launch { grid: [n as u32, 1], block: BLOCK as u32, shared_bytes: (BLOCK / 32 * 8) as u32 };
        let args = [
            cosines.arg(),
            Arg::I32((cosines.len() / n) as i32),
            Arg::I64(first as i64),
            Arg::I32(num as i32),
            rows.labels.arg(),
            Arg::F32(self.config.scale as f32),
            parts.arg(),
            targets.arg(),
        ];
        // SAFETY: there are n rows of cosines with `num` classes each, n labels and targets, and 2 n parts.
        unsafe { cosines.device().launch("margin_softmax", launch, &args) }
    }

    /// Joins the parts of all blocks: returns the rows' softmaxes, four numbers per row (`Row` in `margin.cu`), and the
    /// loss.
    fn join(&self, parts: &Array, targets: &Array, rows: &DeviceRows) -> Result<(Array, Array)> {
        let (device, n) = (parts.device(), rows.labels.len());
        let softmaxes = device.array(Element::F32, 4 * n)?;
        let (losses, loss) = (device.array(Element::F32, n)?, device.array(Element::F32, 1)?);
        let order = device.zeros(Element::I32, n)?;
        let args = [
            parts.arg(),
            Arg::I32((parts.len() / 2 / n) as i32),
            Arg::I32(n as i32),
            Arg::I32(rows.counted as i32),
            rows.labels.arg(),
            targets.arg(),
            rows.margins.arg(),
            rows.positions.arg(),
            Arg::I32(match self.config.matching {
                None => 0,
                Some(PlusMatching::Ranked) => 1,
                Some(PlusMatching::Reference) => 2,
            }),
            order.arg(),
            Arg::I32((self.config.form != MarginForm::Angular).into()),
            Arg::I32((self.config.gradient != MarginGradient::True).into()),
            Arg::F32(self.config.scale as f32),
            softmaxes.arg(),
            losses.arg(),
            loss.arg(),
        ];
        let launch = Launch { grid: [1, 1], block: BLOCK as u32, shared_bytes: (BLOCK / 32 * 4) as u32 };
        // SAFETY: labels, targets, margins, positions, order and losses have n elements or as many as rows are counted,
        // the softmaxes four per row, and the parts two per row and block.
        unsafe { device.launch("margin_rows", launch, &args)? };
        Ok((softmaxes, loss))
    }

    /// Writes the gradient `g: (n, block)` with respect to a block's cosines, without its common factor, and the sums
    /// of `g * cosine` over each chunk of rows.
    fn gradient(
        &self,
        cosines: &Array,
        (first, num): (usize, usize),
        (rows, softmaxes): (&DeviceRows, &Array),
        g: &Array,
        sums: &Array,
    ) -> Result<()> {
        let n = rows.labels.len();
        let (block, (chunk, chunks)) = (cosines.len() / n, chunks_of(n));
        let launch = Launch {
            grid: [block.div_ceil(COLUMNS) as u32, chunks as u32],
            block: BLOCK as u32,
            shared_bytes: (BLOCK / 32 * COLUMNS * 4) as u32,
        };
        let args = [
            cosines.arg(),
            Arg::I32(block as i32),
            Arg::I64(first as i64),
            Arg::I32(num as i32),
            Arg::I32(n as i32),
            Arg::I32(chunk as i32),
            rows.labels.arg(),
            softmaxes.arg(),
            Arg::F32(self.config.scale as f32),
            g.arg(),
            sums.arg(),
        ];
        // SAFETY: cosines and g have n rows of a block, labels n elements, softmaxes four per row, and each chunk of
        // rows has its own sums.
        unsafe { cosines.device().launch(&format!("margin_gradient_{}", g.element().suffix()), launch, &args) }
    }
}

/// Returns the rows of `x: (n, d)`, f32, scaled to unit length, and their inverse norms.
pub(super) fn unit_rows_of(x: &Array, n: usize) -> Result<(Array, Array)> {
    let (unit, inv_norms) = (x.device().array(Element::F32, x.len())?, x.device().array(Element::F32, n)?);
    unit_rows(x, n, &unit, &inv_norms)?;
    Ok((unit, inv_norms))
}

/// Writes the rows of `x`, `rows` of them, scaled to unit length, and their inverse norms.
fn unit_rows(x: &Array, rows: usize, unit: &Array, inv_norms: &Array) -> Result<()> {
    let d = unit.len() / inv_norms.len().max(1);
    check_rows(x, rows, d)?;
    if rows > inv_norms.len() || inv_norms.element() != Element::F32 {
        bail!("margin: {rows} rows for {} inverse norms", inv_norms.len());
    }
    let args = [x.arg(), Arg::I64(rows as i64), Arg::I32(d as i32), unit.arg(), inv_norms.arg()];
    // SAFETY: x has these rows, and there is room for as many.
    unsafe { x.device().launch(&format!("margin_unit_rows_{}", unit.element().suffix()), warps(rows), &args) }
}

/// Checks that `x` has `rows` rows of `d` f32.
fn check_rows(x: &Array, rows: usize, d: usize) -> Result<()> {
    fits("margin", Element::F32, &[(Some(x), rows * d)])?;
    if !d.is_multiple_of(Element::F32.per_access()) {
        bail!("margin: rows of {d} elements");
    }
    Ok(())
}

/// Returns the maxima and sums of the rows on each rank, and replaces the target cosines, of which each rank has those
/// of its classes and zeros, by those of all.
fn over_ranks(parts: &Array, targets: &Array, ranks: &Ranks) -> crate::Result<Array> {
    let (device, n) = (parts.device(), targets.len());
    // Ranks may have different numbers of blocks.
    let joined = device.array(Element::F32, 2 * n)?;
    let args = [parts.arg(), Arg::I32((parts.len() / 2 / n) as i32), Arg::I32(n as i32), joined.arg()];
    let launch = Launch { grid: [n.div_ceil(BLOCK) as u32, 1], block: BLOCK as u32, shared_bytes: 0 };
    // SAFETY: there are two parts per row and block, and two joined ones per row.
    unsafe { device.launch("margin_join", launch, &args)? };
    exchange::sum_in_place(targets, 1.0, ranks)?;
    exchange::collect(&joined, Collective::Gather, ranks)
}

/// Number of rows per chunk, and number of chunks.
fn chunks_of(n: usize) -> (usize, usize) {
    let chunk = n.div_ceil(MAX_CHUNKS).max(8);
    (chunk, n.div_ceil(chunk))
}

/// Dot products of the class centres' gradients with the unit centres, as sums over chunks of rows: `(chunks, stride)`,
/// still to be multiplied by `factor`.
pub(super) struct Sums {
    all: Array,
    stride: usize,
    factor: f32,
}

/// Turns the gradient of unit rows into that of `x`, in place, for as many rows as there are inverse norms.
pub(super) fn through_unit_rows(x: &Array, inv_norms: &Array, sums: Option<&Sums>, gradient: &Array) -> Result<()> {
    let rows = inv_norms.len();
    let d = gradient.len() / rows.max(1);
    check_rows(x, rows, d)?;
    fits("margin", Element::F32, &[(Some(inv_norms), rows), (Some(gradient), rows * d)])?;
    let (stride, factor) = sums.map_or((1, 0.0), |s| (s.stride, s.factor));
    let args = [
        x.arg(),
        inv_norms.arg(),
        sums.map(|s| &s.all).into(),
        Arg::I32(sums.map_or(0, |s| (s.all.len() / s.stride) as i32)),
        Arg::I32(stride as i32),
        Arg::F32(factor),
        Arg::I64(rows as i64),
        Arg::I32(d as i32),
        gradient.arg(),
    ];
    // SAFETY: x has these rows, and each of them has a norm and a gradient.
    unsafe { x.device().launch("margin_through_unit_rows", warps(rows), &args) }
}

/// Launch with one warp per row.
pub(super) fn warps(rows: usize) -> Launch {
    Launch { grid: [(rows * 32).div_ceil(BLOCK) as u32, 1], block: BLOCK as u32, shared_bytes: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::tests::{ELEMENTS, close, device, numbers, read};
    use crate::ops::backend::Backend;
    use crate::ops::cpu::Cpu;

    const KINDS: [(MarginForm, MarginGradient, Option<PlusMatching>); 5] = [
        (MarginForm::Angular, MarginGradient::True, None),
        (MarginForm::Angular, MarginGradient::StraightThrough, None),
        (MarginForm::Cosine, MarginGradient::True, None),
        (MarginForm::Cosine, MarginGradient::True, Some(PlusMatching::Ranked)),
        (MarginForm::Angular, MarginGradient::True, Some(PlusMatching::Reference)),
    ];

    /// Embeddings `(n, d)`, centres `(k, d)`, labels and margins.
    struct Case {
        sizes: [usize; 3],
        embeddings: Vec<f32>,
        centres: Vec<f32>,
        labels: Vec<i64>,
        margins: Vec<f64>,
    }

    impl Case {
        fn new([n, d, k]: [usize; 3]) -> Self {
            let mut embeddings = numbers("e", n * d, [-2.0, 2.0]);
            let centres = numbers("w", k * d, [-0.1, 0.1]);
            // Every fourth row has no label; the first row has the last class.
            let label = |i: usize| if i % 4 == 3 { -1 } else { (k as i64 - 1 - 7 * i as i64).rem_euclid(k as i64) };
            let mut labels: Vec<i64> = (0..n).map(label).collect();
            if n > 4 {
                // Two rows with equal cosines: a tie that ranking must break as the CPU does.
                embeddings.copy_within(..d, 4 * d);
                labels[4] = labels[0];
            }
            let margins = numbers("m", n, [0.3, 0.6]).into_iter().map(f64::from).collect();
            Self { sizes: [n, d, k], embeddings, centres, labels, margins }
        }

        fn rows(&self) -> margin_loss::Rows<'_> {
            margin_loss::Rows { labels: &self.labels, margins: &self.margins }
        }

        /// Loss and gradients of embeddings and centres by the CPU op, whose centres are `(d, k)`.
        fn on_cpu(&self, loss: &DeviceMarginLoss, weight: f64) -> Result<(f32, Vec<f32>, Vec<f32>)> {
            let [_, d, k] = self.sizes;
            let turned = |x: &[f32], rows: usize| -> Vec<f32> {
                let columns = x.len() / rows;
                (0..x.len()).map(|i| x[i % rows * columns + i / rows]).collect()
            };
            let (centres, mut of_centres) = (turned(&self.centres, k), vec![0.0; d * k]);
            let task = margin_loss::MarginTask { rows: self.rows(), config: loss.config, weight, ranks: None };
            let found = Cpu.margin_loss(&self.embeddings, &centres, task, &mut of_centres)?;
            Ok((found.loss as f32, found.of_embeddings, turned(&of_centres, d)))
        }

        fn on_gpu(&self, device: &Device, loss: &DeviceMarginLoss, weight: f32) -> Result<(Array, Array, Array)> {
            let [_, d, k] = self.sizes;
            let rows = DeviceRows::new(device, self.rows(), loss.config.matching)?;
            let of_centres = device.array(Element::F32, k * d)?;
            let centres = device.upload(&self.centres)?;
            let centres = Centres { values: &centres, ranks: None };
            let e = device.upload(&self.embeddings)?;
            let found = loss.with_gradients(&e, &centres, &rows, weight, &of_centres)?;
            Ok((found.loss, found.of_embeddings, of_centres))
        }
    }

    fn loss(
        (form, gradient, matching): (MarginForm, MarginGradient, Option<PlusMatching>),
        max_cosines: usize,
    ) -> DeviceMarginLoss {
        let config = MarginLossConfig { form, gradient, scale: 64.0, matching };
        DeviceMarginLoss { config, element: Element::F32, max_cosines }
    }

    #[test]
    fn loss_and_gradients_are_those_of_the_cpu() -> Result<()> {
        let device = device();
        // One class; one row; class counts that no access divides; several blocks of classes, the last one partial.
        for (sizes, max_cosines) in [
            ([3, 8, 1], MAX_COSINES),
            ([1, 16, 5], MAX_COSINES),
            ([7, 24, 131], MAX_COSINES),
            ([33, 40, 700], 33 * 256),
            ([70, 64, 385], 0),
        ] {
            let case = Case::new(sizes);
            for kind in KINDS {
                let loss = loss(kind, max_cosines);
                let (value, of_e, of_w) = case.on_cpu(&loss, 0.5)?;
                let (on_gpu, gpu_e, gpu_w) = case.on_gpu(&device, &loss, 0.5)?;
                close("loss", &on_gpu, &[value], 1e-5)?;
                // With one class the loss is 0 and its gradient is rounding error.
                if sizes[2] > 1 {
                    close("embeddings", &gpu_e, &of_e, 1e-4)?;
                    close("centres", &gpu_w, &of_w, 1e-4)?;
                }
            }
        }
        Ok(())
    }

    #[test]
    fn products_of_16_bits_stay_close() -> Result<()> {
        let (device, case) = (device(), Case::new([20, 64, 300]));
        let loss = loss(KINDS[0], 20 * 128);
        let (value, of_e, of_w) = case.on_cpu(&loss, 1.0)?;
        for element in ELEMENTS {
            let loss = DeviceMarginLoss { element, ..loss };
            let (on_gpu, gpu_e, gpu_w) = case.on_gpu(&device, &loss, 1.0)?;
            // Cosines have a relative error of up to 2^-9, and logits 64 times the error of the cosine.
            let tol = if element == Element::F32 { 1e-5 } else { 0.03 };
            close("loss", &on_gpu, &[value], tol)?;
            close("embeddings", &gpu_e, &of_e, 3.0 * tol)?;
            close("centres", &gpu_w, &of_w, 3.0 * tol)?;
        }
        Ok(())
    }

    #[test]
    fn rows_without_a_label_and_cosines_of_one_are_finite() -> Result<()> {
        let device = device();
        let mut case = Case::new([8, 16, 140]);
        // Embeddings equal to their centres, opposite to them, and zero; a zero centre.
        for i in 0..6 {
            let sign = if i < 3 { 1.0 } else { -1.0 };
            let centre: Vec<f32> = case.centres[i * 16..][..16].iter().map(|x| sign * x).collect();
            case.embeddings[i * 16..][..16].copy_from_slice(&centre);
            case.labels[i] = i as i64;
        }
        case.embeddings[6 * 16..7 * 16].fill(0.0);
        case.centres[139 * 16..].fill(0.0);
        case.labels[6..].copy_from_slice(&[139, -1]);
        for kind in KINDS {
            let (value, of_e, of_w) = case.on_gpu(&device, &loss(kind, 0), 1.0)?;
            for array in [value, of_e.clone(), of_w] {
                assert!(read(&array)?.iter().all(|x| x.is_finite()), "{kind:?}");
            }
            assert!(read(&of_e)?[7 * 16..].iter().all(|g| *g == 0.0), "a row without a label has a gradient");
        }
        case.labels.fill(-1);
        let (value, of_e, of_w) = case.on_gpu(&device, &loss(KINDS[0], 0), 1.0)?;
        assert!(read(&value)? == [0.0] && read(&of_e)?.iter().chain(&read(&of_w)?).all(|g| *g == 0.0));
        Ok(())
    }

    #[test]
    fn no_gradient_passes_a_cosine_that_was_clamped() -> Result<()> {
        let device = device();
        // Cosines that rounding made larger than 1 in magnitude, among the targets and elsewhere.
        let mut cosines = numbers("c", 3 * 128, [-0.9, 0.9]);
        [cosines[0], cosines[128 + 1], cosines[2 * 128 + 2], cosines[4]] = [1.0 + 1e-6, -1.0 - 1e-6, 1.0, 1.0 + 1e-6];
        let (mut loss, labels, num) = (loss(KINDS[0], 0), [0, 1, 2], 60);
        loss.config.scale = 4.0;
        let rows = DeviceRows::new(&device, margin_loss::Rows { labels: &labels, margins: &[0.5; 3] }, None)?;
        let on_gpu = device.upload(&cosines)?;
        let [parts, targets] = [6, 3].map(|len| device.array(Element::F32, len));
        let (parts, targets) = (parts?, targets?);
        loss.softmax(&on_gpu, (0, num), &rows, &parts, &targets)?;
        let (softmaxes, _) = loss.join(&parts, &targets, &rows)?;
        let (g, sums) = (device.array(Element::F32, 3 * 128)?, device.array(Element::F32, 128)?);
        loss.gradient(&on_gpu, (0, num), (&rows, &softmaxes), &g, &sums)?;
        let g = read(&g)?;
        let expected: Vec<f32> = (0..3 * 128)
            .map(|at| {
                let (row, class) = (at / 128, at % 128);
                let logit = |class: usize| {
                    let cosine = f64::from(cosines[row * 128 + class]).clamp(-1.0, 1.0);
                    4.0 * if class == row { (cosine.acos() + 0.5).cos() } else { cosine }
                };
                let p = logit(class).exp() / (0..num).map(|class| logit(class).exp()).sum::<f64>();
                match cosines[at].abs() > 1.0 || class >= num {
                    true => 0.0,
                    // The slope at an angle of 0, whose sine is clamped to 1e-3.
                    false if class == row => ((p - 1.0) * (0.5f64.cos() + 0.5f64.sin() / 1e-3)) as f32,
                    false => p as f32,
                }
            })
            .collect();
        close("g", &device.upload(&g)?, &expected, 1e-6)?;
        assert!([0, 128 + 1, 4].iter().all(|at| g[*at] == 0.0) && g[2 * 128 + 2] < -100.0);
        let of_class = |class: usize| (0..3).map(|row| g[row * 128 + class] * cosines[row * 128 + class]).sum();
        close("sums", &sums, &(0..128).map(of_class).collect::<Vec<f32>>(), 1e-6)
    }

    #[test]
    fn a_diverged_network_is_noticed() -> Result<()> {
        let device = device();
        let mut case = Case::new([4, 8, 20]);
        case.embeddings[8] = f32::NAN;
        let (value, ..) = case.on_gpu(&device, &loss(KINDS[3], 0), 1.0)?;
        assert!(read(&value)?[0].is_nan());
        Ok(())
    }
}

//! SVG plots of metrics over the steps of a training, and their legends.

use maud::{Markup, html};
use plotters::prelude::*;

use super::axis::{NumberAxis, Scale, number};
use super::figures::Figure;
use super::plot::{COLOURS, TEXT, TITLE};
use crate::error::{Error, Result};
use crate::records::StepRecord;

/// Maximum number of points of a line: more would not show at the width of a plot.
const MAX_POINTS: usize = 600;
const SIZE: (u32, u32) = (520, 300);

/// Summary of a metric over some consecutive steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Bucket {
    /// Middle of the steps.
    pub step: f64,
    pub mean: f64,
    pub low: f64,
    pub high: f64,
}

/// A line of a plot.
#[derive(Debug)]
pub(super) struct Curve<'a> {
    pub name: &'a str,
    /// Index into [`COLOURS`], modulo their number.
    pub colour: usize,
    pub points: Vec<Bucket>,
}

/// Lines over the steps of a training.
#[derive(Debug)]
pub(super) struct Plot<'a> {
    pub title: &'a str,
    /// Scale of the value axis.
    pub scale: Scale,
    /// Whether to mark every point, for lines of few points.
    pub has_marks: bool,
    /// End of the step axis.
    pub last_step: usize,
    pub curves: &'a [Curve<'a>],
}

impl Bucket {
    /// Bucket of a single value.
    pub fn of_one(step: usize, value: f64) -> Self {
        Self { step: step as f64, mean: value, low: value, high: value }
    }
}

/// Number of steps per point of a line.
pub(super) fn bucket_size(num_steps: usize) -> usize {
    num_steps.div_ceil(MAX_POINTS).max(1)
}

/// Returns a metric in buckets of steps, without the buckets that have no finite value.
pub(super) fn buckets(steps: &[StepRecord], figure: Figure) -> Vec<Bucket> {
    steps.chunks(bucket_size(steps.len())).filter_map(|chunk| bucket(chunk, figure)).collect()
}

fn bucket(chunk: &[StepRecord], figure: Figure) -> Option<Bucket> {
    let [first, last] = [chunk.first()?, chunk.last()?].map(|point| point.step as f64);
    let mut bucket = Bucket { step: (first + last) / 2.0, mean: 0.0, low: f64::INFINITY, high: f64::NEG_INFINITY };
    let mut num = 0.0;
    for value in chunk.iter().filter_map(|step| figure.of(step)) {
        num += 1.0;
        // Two divisions, because a difference or sum of the largest numbers overflows.
        bucket.mean += value / num - bucket.mean / num;
        bucket.low = bucket.low.min(value);
        bucket.high = bucket.high.max(value);
    }
    (num > 0.0).then_some(bucket)
}

/// Smallest and largest of all values.
pub(super) fn ends(curves: &[Curve]) -> [f64; 2] {
    let points = curves.iter().flat_map(|curve| &curve.points);
    points.fold([f64::INFINITY, f64::NEG_INFINITY], |[low, high], p| [low.min(p.low), high.max(p.high)])
}

impl Plot<'_> {
    /// Draws the lines, each over a band from its minimum to its maximum. There must be at least one point.
    pub fn svg(&self) -> Result<String> {
        let wrong = |e: &dyn std::fmt::Display| Error::Training(format!("cannot draw a plot: {e}"));
        let mut svg = String::new();
        {
            let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
            let mut chart = ChartBuilder::on(&area)
                .margin(8)
                .margin_right(28)
                .caption(self.title, TITLE)
                .x_label_area_size(40)
                .y_label_area_size(56)
                .build_cartesian_2d(NumberAxis::steps(self.last_step), self.values())
                .map_err(|e| wrong(&e))?;
            chart
                .configure_mesh()
                .x_desc("step")
                .x_label_formatter(&|v| number(*v))
                .y_label_formatter(&|v| number(*v))
                .light_line_style(TRANSPARENT)
                .label_style(TEXT)
                .axis_desc_style(TEXT)
                .draw()
                .map_err(|e| wrong(&e))?;
            for Curve { colour, points, .. } in self.curves {
                if points.iter().any(|p| p.low < p.high) {
                    let back = points.iter().rev().map(|p| (p.step, p.high));
                    let outline: Vec<_> = points.iter().map(|p| (p.step, p.low)).chain(back).collect();
                    let band = Polygon::new(outline, of(*colour).mix(0.12).filled());
                    chart.draw_series([band]).map_err(|e| wrong(&e))?;
                }
            }
            for Curve { colour, points, .. } in self.curves {
                let line: Vec<_> = points.iter().map(|p| (p.step, p.mean)).collect();
                if self.has_marks || line.len() == 1 {
                    let marks = line.iter().map(|at| Circle::new(*at, 3, of(*colour).filled()));
                    chart.draw_series(marks).map_err(|e| wrong(&e))?;
                }
                chart.draw_series(LineSeries::new(line, of(*colour).stroke_width(2))).map_err(|e| wrong(&e))?;
            }
            area.present().map_err(|e| wrong(&e))?;
        }
        Ok(svg)
    }

    /// Value axis with a small margin, which never takes non-negative values below zero.
    fn values(&self) -> NumberAxis {
        let [low, high] = ends(self.curves);
        if self.scale == Scale::Log {
            return NumberAxis::log(low / 1.2, (high * 1.2).min(f64::MAX));
        }
        let room = 0.04 * (high / 2.0 - low / 2.0) * 2.0;
        NumberAxis::linear(if low >= 0.0 { (low - room).max(0.0) } else { low - room }, high + room)
    }
}

/// Legend: the colour and name of each line.
pub(super) fn legend(curves: &[Curve]) -> Markup {
    html! {
        @for curve in curves {
            @let RGBColor(r, g, b) = of(curve.colour);
            span {
                svg width="18" height="8" viewBox="0 0 18 8" aria-hidden="true" {
                    line x1="0" y1="4" x2="18" y2="4" stroke-width="3" stroke=(format!("#{r:02X}{g:02X}{b:02X}")) {}
                }
                (curve.name)
            }
        }
    }
}

fn of(colour: usize) -> RGBColor {
    COLOURS[colour % COLOURS.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::figures::LOSS;
    use crate::report::figures::tests::step;

    fn steps(values: impl IntoIterator<Item = Option<f64>>) -> Vec<StepRecord> {
        let steps = values.into_iter().enumerate();
        steps.map(|(i, value)| step(i + 1, value.unwrap_or(f64::NAN))).collect()
    }

    #[test]
    fn a_bucket_is_the_mean_of_what_was_finite_in_it() {
        // 1500 steps: three to a bucket.
        let values = (0..1500).map(|i| (i % 3 != 1).then_some(f64::from(i)));
        let found = buckets(&steps(values), LOSS);
        assert_eq!(found.len(), 500);
        for (i, bucket) in found.iter().enumerate() {
            let first = 3.0 * i as f64;
            assert_eq!(*bucket, Bucket { step: first + 2.0, mean: first + 1.0, low: first, high: first + 2.0 });
        }
        let found = buckets(&steps([Some(1.0), None, Some(f64::NAN), Some(4.0)]), LOSS);
        assert_eq!(found, [Bucket::of_one(1, 1.0), Bucket::of_one(4, 4.0)]);
        assert_eq!(buckets(&steps([None]), LOSS), []);
        assert_eq!(buckets(&[], LOSS), []);
    }

    #[test]
    fn lines_are_short_and_means_of_the_largest_numbers_are_numbers() {
        for len in [1, 600, 601, 1199, 1200, 1201, 100_003] {
            let found = buckets(&steps((0..len).map(|_| Some(1.0))), LOSS);
            assert!(found.len() <= MAX_POINTS && found.len() >= len.min(MAX_POINTS / 2), "{len}: {}", found.len());
        }
        let found = buckets(&steps((0..1200).map(|i| Some(if i % 2 == 0 { f64::MAX } else { -f64::MAX }))), LOSS);
        assert!(found.iter().all(|b| b.mean.abs() < 1e300), "{:?}", found[0]);
    }
}

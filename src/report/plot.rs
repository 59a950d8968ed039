//! SVG curves and histograms. The style sheet of the page redraws everything black in its text colour.

use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::prelude::*;

use super::probit::{ProbitAxis, per_cent};
use crate::error::{Error, Result};
use crate::eval::{Histogram, OperatingPoint};

/// Palette that is safe for colour-blind readers, on black and on white (Okabe and Ito).
pub(super) const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];
const SIZE: (u32, u32) = (520, 400);
pub(super) const TEXT: (&str, i32) = ("sans-serif", 14);
pub(super) const TITLE: (&str, i32) = ("sans-serif", 17);

/// A named curve.
pub(super) type Line<'a> = (&'a str, &'a [OperatingPoint]);

/// DET plot: false non-match rate against false match rate, both on probit axes.
pub(super) fn det(title: &str, lines: &[Line]) -> Result<String> {
    let rates = |of: fn(&OperatingPoint) -> f64| {
        let rates = lines.iter().flat_map(|(_, points)| points.iter().map(of));
        rates.filter(|rate| *rate > 0.0).fold(0.1, f64::min)
    };
    // A little beyond the smallest rate that the scores can show.
    let low = |of| (rates(of) / 1.5).clamp(1e-7, 0.05);
    let (x, y) = (ProbitAxis::new(low(|p| p.fmr), 0.6), ProbitAxis::new(low(|p| p.fnmr), 0.6));
    let ends = [x.range().start, y.range().start];
    let points = |line: &[OperatingPoint]| {
        let inside = line.iter().filter(|p| p.fmr > 0.0 && p.fmr < 0.6 && p.fnmr < 0.6);
        inside.map(|p| (p.fmr.max(ends[0]), p.fnmr.max(ends[1]))).collect::<Vec<_>>()
    };
    let axes = ["false match rate, %", "false non-match rate, %"];
    curves(title, axes, x, y, lines, points, SeriesLabelPosition::UpperRight)
}

/// ROC plot: true accept rate against false accept rate, the latter on a logarithmic axis.
pub(super) fn roc(title: &str, lines: &[Line]) -> Result<String> {
    let far = lines.iter().flat_map(|(_, points)| points.iter().map(|p| p.fmr)).filter(|far| *far > 0.0);
    let low = (far.fold(0.1, f64::min) / 1.5).max(1e-7);
    let tar = lines.iter().flat_map(|(_, points)| points.iter().filter(|p| p.fmr >= low).map(|p| 1.0 - p.fnmr));
    let bottom = (tar.fold(1.0, f64::min) * 20.0).floor().min(19.0) / 20.0;
    let points = |line: &[OperatingPoint]| {
        line.iter().filter(|p| p.fmr > 0.0).map(|p| (p.fmr.max(low), 1.0 - p.fnmr)).collect::<Vec<_>>()
    };
    let axes = ["false accept rate, %", "true accept rate, %"];
    let x = (low..1.0).log_scale();
    curves(title, axes, x, bottom..1.0, lines, points, SeriesLabelPosition::LowerRight)
}

/// Draws lines with axes and a legend.
fn curves<X, Y>(
    title: &str,
    axes: [&str; 2],
    x: X,
    y: Y,
    lines: &[Line],
    points: impl Fn(&[OperatingPoint]) -> Vec<(f64, f64)>,
    legend: SeriesLabelPosition,
) -> Result<String>
where
    X: AsRangedCoord<Value = f64>,
    X::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
    Y: AsRangedCoord<Value = f64>,
    Y::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .margin(8)
            .margin_right(20)
            .caption(title, TITLE)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(x, y)
            .map_err(wrong)?;
        chart
            .configure_mesh()
            .x_desc(axes[0])
            .y_desc(axes[1])
            .x_label_formatter(&|v| per_cent(*v))
            .y_label_formatter(&|v| per_cent(*v))
            .light_line_style(TRANSPARENT)
            .label_style(TEXT)
            .axis_desc_style(TEXT)
            .draw()
            .map_err(wrong)?;
        for ((name, line), colour) in lines.iter().zip(COLOURS.iter().cycle()) {
            let style = colour.stroke_width(2);
            chart
                .draw_series(LineSeries::new(points(line), style))
                .map_err(wrong)?
                .label(*name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], style));
        }
        chart.configure_series_labels().position(legend).label_font(TEXT).draw().map_err(wrong)?;
        area.present().map_err(wrong)?;
    }
    Ok(svg)
}

fn wrong(e: impl std::fmt::Display) -> Error {
    Error::Evaluation(format!("cannot draw a plot: {e}"))
}

/// Histogram of genuine and impostor scores, as shares.
pub(super) fn histogram(title: &str, bars: &Histogram) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (SIZE.0, 240)).into_drawing_area();
        let highest = bars.genuine.iter().chain(&bars.impostor).copied().fold(0.0, f64::max);
        let width = ((bars.high - bars.low) / bars.genuine.len() as f64).max(f64::MIN_POSITIVE);
        let right = bars.low + width * bars.genuine.len() as f64;
        let mut chart = ChartBuilder::on(&area)
            .margin(8)
            .margin_right(20)
            .caption(title, TITLE)
            .x_label_area_size(36)
            .y_label_area_size(52)
            .build_cartesian_2d(bars.low..right, 0.0..1.05 * highest)
            .map_err(wrong)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .x_desc("score")
            .y_desc("share of the pairs, %")
            .y_labels(4)
            .y_label_formatter(&|v| per_cent((*v * 1e4).round() / 1e4))
            .label_style(TEXT)
            .axis_desc_style(TEXT)
            .draw()
            .map_err(wrong)?;
        for (kind, shares, colour) in [("impostor", &bars.impostor, COLOURS[1]), ("genuine", &bars.genuine, COLOURS[0])]
        {
            let bar = |(i, share): (usize, &f64)| {
                let left = bars.low + i as f64 * width;
                Rectangle::new([(left, 0.0), (left + width, *share)], colour.mix(0.55).filled())
            };
            chart
                .draw_series(shares.iter().enumerate().filter(|(_, share)| **share > 0.0).map(bar))
                .map_err(wrong)?
                .label(kind)
                .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 14, y + 5)], colour.mix(0.55).filled()));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .label_font(TEXT)
            .draw()
            .map_err(wrong)?;
        area.present().map_err(wrong)?;
    }
    Ok(svg)
}

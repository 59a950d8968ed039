//! Layouts of parameters on devices.

/// Layout of a parameter on the device.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Order {
    /// Same layout as in the checkpoint.
    #[default]
    Same,
    /// From `(co, c, pixels)` to `(rows, pixels, padded)`: filters, and fully connected layers that read an image.
    /// Channels from `c` on and rows from `co` on are zeros, whose gradient is zero; `rows` is `co` if none.
    ChannelsLast { c: usize, pixels: usize, padded: usize, rows: Option<usize> },
    /// From `(c, m, pixels)` to `(pixels, m, padded)`: filters for groups of `m` channels. Channels from `c` on are
    /// zeros.
    Grouped { c: usize, m: usize, padded: usize },
}

impl Order {
    /// From `(rows, columns)` to `(columns, rows)`.
    pub fn transposed(rows: usize, columns: usize) -> Self {
        Self::ChannelsLast { c: rows, pixels: columns, padded: rows, rows: None }
    }

    /// From `(c)` to `(padded)`, with zeros from `c` on.
    pub fn padded(c: usize, padded: usize) -> Self {
        Self::ChannelsLast { c, pixels: 1, padded, rows: None }
    }

    /// Source index of each element of the device's layout of `len` elements in the checkpoint's; none for padding
    /// zeros.
    fn sources(&self, len: usize) -> Box<dyn Iterator<Item = Option<usize>>> {
        match *self {
            Self::Same => Box::new((0..len).map(Some)),
            Self::ChannelsLast { c, pixels, padded, rows } => {
                let co = len / (c * pixels);
                Box::new((0..rows.unwrap_or(co) * pixels * padded).map(move |i| {
                    let (o, pixel, channel) = (i / (pixels * padded), i / padded % pixels, i % padded);
                    (channel < c && o < co).then_some((o * c + channel) * pixels + pixel)
                }))
            }
            Self::Grouped { c, m, padded } => {
                let pixels = len / c / m;
                Box::new((0..pixels * m * padded).map(move |i| {
                    let (pixel, of_group, channel) = (i / (m * padded), i / padded % m, i % padded);
                    (channel < c).then_some((channel * m + of_group) * pixels + pixel)
                }))
            }
        }
    }

    /// Appends values in the device's layout to `to`.
    pub fn laid_out(&self, values: &[f32], to: &mut Vec<f32>) {
        match self {
            Self::Same => to.extend_from_slice(values),
            _ => to.extend(self.sources(values.len()).map(|from| from.map_or(0.0, |from| values[from]))),
        }
    }

    /// Returns the `len` values of the checkpoint's layout.
    pub fn restored(&self, values: &[f32], len: usize) -> Vec<f32> {
        if *self == Self::Same {
            return values.to_vec();
        }
        let mut all = vec![0.0; len];
        for (value, to) in values.iter().zip(self.sources(len)) {
            if let Some(to) = to {
                all[to] = *value;
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_those_of_their_definition_and_back() {
        let values: Vec<f32> = (1..=12).map(|i| i as f32).collect();
        // Two filters of three channels by two pixels; six groups of two channels by one pixel.
        for (order, expected) in [
            (
                Order::ChannelsLast { c: 3, pixels: 2, padded: 3, rows: None },
                vec![1, 3, 5, 2, 4, 6, 7, 9, 11, 8, 10, 12],
            ),
            (
                Order::ChannelsLast { c: 3, pixels: 2, padded: 4, rows: Some(3) },
                vec![1, 3, 5, 0, 2, 4, 6, 0, 7, 9, 11, 0, 8, 10, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            ),
            (Order::Grouped { c: 6, m: 2, padded: 7 }, vec![1, 3, 5, 7, 9, 11, 0, 2, 4, 6, 8, 10, 12, 0]),
            (Order::transposed(3, 4), vec![1, 5, 9, 2, 6, 10, 3, 7, 11, 4, 8, 12]),
            (Order::padded(12, 14), vec![1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 0]),
        ] {
            let mut found = Vec::new();
            order.laid_out(&values, &mut found);
            assert_eq!(found, expected.into_iter().map(|i| i as f32).collect::<Vec<_>>(), "{order:?}");
            assert_eq!(order.restored(&found, 12), values, "{order:?}");
        }
    }
}

//! Layouts of parameters on devices.

/// Layout of a parameter on the device.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Order {
    /// Same layout as in the checkpoint.
    #[default]
    Same,
    /// From `(co, c, pixels)` to `(co, pixels, padded)`: filters, and fully connected layers that read an image.
    /// Channels from `c` on are zeros, whose gradient is zero.
    ChannelsLast { c: usize, pixels: usize, padded: usize },
    /// From `(c, m, pixels)` to `(pixels, m, c)`: filters for groups of `m` channels.
    Grouped { c: usize, m: usize },
}

impl Order {
    /// From `(rows, columns)` to `(columns, rows)`.
    pub fn transposed(rows: usize, columns: usize) -> Self {
        Self::ChannelsLast { c: rows, pixels: columns, padded: rows }
    }

    /// Number of elements on the device of `len` in the checkpoint.
    fn len(&self, len: usize) -> usize {
        match *self {
            Self::ChannelsLast { c, padded, .. } => len / c * padded,
            Self::Same | Self::Grouped { .. } => len,
        }
    }

    /// Source index of each element of the device's layout; none for padding zeros.
    fn sources(&self, len: usize) -> Box<dyn Iterator<Item = Option<usize>>> {
        match *self {
            Self::Same => Box::new((0..len).map(Some)),
            Self::ChannelsLast { c, pixels, padded } => Box::new((0..self.len(len)).map(move |i| {
                let (o, pixel, channel) = (i / (pixels * padded), i / padded % pixels, i % padded);
                (channel < c).then_some((o * c + channel) * pixels + pixel)
            })),
            Self::Grouped { c, m } => {
                let pixels = len / c / m;
                Box::new((0..len).map(move |i| Some((i % c * m + i / c % m) * pixels + i / c / m)))
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

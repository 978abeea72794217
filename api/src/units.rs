//! Quantities whose unit is in their type, in the Engine API's JSON as plain integers.

use std::time::Duration;

use serde::{Deserialize, Serialize};

macro_rules! quantities {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash,
                 Serialize, Deserialize, bincode::Encode, bincode::Decode)]
        #[serde(transparent)]
        pub struct $name(pub i64);

        impl $name {
            #[must_use]
            pub const fn is_zero(&self) -> bool {
                self.0 == 0
            }
        }
    )*};
}

quantities! {
    /// Billionths of a CPU.
    NanoCpus,
    /// Bytes.
    ByteSize,
    /// A length of time in nanoseconds.
    Nanos,
}

impl Nanos {
    #[must_use]
    pub const fn from_secs(seconds: i64) -> Self {
        Self(seconds * 1_000_000_000)
    }

    /// As a `Duration`; a negative length is none.
    #[must_use]
    pub fn duration(self) -> Duration {
        Duration::from_nanos(self.0.try_into().unwrap_or(0))
    }
}

/// Reads durations as Go writes them: `1h30m`, `10s`, `1.5h`, `300ms`.
#[must_use]
pub fn parse_duration(text: &str) -> Option<Duration> {
    let (mut rest, mut total) = (text, Duration::ZERO);
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..end].parse().ok()?;
        rest = &rest[end..];
        let end = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let unit = match &rest[..end] {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        total = total.checked_add(Duration::try_from_secs_f64(number * unit).ok()?)?;
        rest = &rest[end..];
    }
    (!text.is_empty()).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_writes_them() {
        assert_eq!(parse_duration("1h30m"), Some(Duration::from_secs(5400)));
        assert_eq!(parse_duration("1.5s"), Some(Duration::from_millis(1500)));
        assert_eq!(parse_duration("300ms"), Some(Duration::from_millis(300)));
        assert_eq!((parse_duration(""), parse_duration("5"), parse_duration("5x")), (None, None, None));
    }
}

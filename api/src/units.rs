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

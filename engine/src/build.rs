//! Images from Dockerfiles: reading them, what each instruction does, and the layers they come to.

mod builder;
mod context;
mod copying;
pub(crate) mod instruction;
mod parse;
mod running;
mod stage;
mod words;

pub use builder::{BuildError, BuildOptions, BuildOutput, check_dockerfile};
pub(crate) use context::clean;
pub use copying::{fetch, unpack_context};

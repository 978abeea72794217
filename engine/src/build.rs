//! Images from Dockerfiles: reading them, what each instruction does, and the layers they come to.

mod builder;
mod chmod;
mod context;
mod copying;
pub(crate) mod instruction;
mod mounting;
mod parse;
mod plan;
mod running;
mod stage;
mod words;

pub use builder::{
    BuildError, BuildOptions, BuildOutput, Client as BuildClient, Lender, Lending, NamedContext, Step as BuildStep,
};
pub(crate) use context::clean;
pub use context::ignored_patterns;
pub use copying::{fetch, unpack_context};
pub use plan::check_dockerfile;
pub use stage::ImageFiles;

/// What stands where a container's image is named, for those in which a build runs its commands; no
/// image can be called so.
pub(crate) const BUILD_IMAGE: &str = "<build>";

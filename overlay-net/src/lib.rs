//! Skep's overlay: networks that tasks on any node share, encrypted between nodes; virtual addresses
//! that stand for services; the routing mesh behind published ports; and names for all of it.
//!
//! What there should be follows from facts that the managers stream; [`Overlay`] keeps kernel and
//! data path in line with them and says which revision they hold. The data path is a process of its
//! own (the same binary, [`path_main`]), so packets go on while the daemon is away.
//!
//! It knows nothing of raft, and of containers only their network namespaces.

mod path;

#[doc(hidden)]
pub mod measured;

mod adoption;
mod carrier;
mod conntrack;
mod diagnosis;
mod kernel;
mod keys;
mod overlay;
mod plan;
mod retarget;
mod ruleset;
mod serving;
mod sys;

pub use diagnosis::Finding;
pub use kernel::sealed::has_kernel_wireguard;
pub use overlay::{FactsUpdate, Joining, Overlay, OverlayConfig};
pub use path::path_main;
pub use plan::{LocalPort, NetworkAddress};

/// Where a container's names are served.
pub const NAME_SERVER: std::net::Ipv4Addr = skep_name_server::ADDRESS;

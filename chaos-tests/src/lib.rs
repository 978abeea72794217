//! Several hosts on one machine, for tests and for the demo: each is a set of namespaces (network,
//! mounts, UTS) joined to the others by a bridge, with a cgroup of its own and the real binary in
//! it. Hosts can be killed, paused, cut off and brought back; dropping a [`Rig`] removes it all.

mod api;
mod host;
mod image;
mod processes;
mod registry;
mod rig;
mod scene;
mod schema;
mod turn;
mod wait;

pub use api::{Answer, Api};
pub use host::{Host, Ran, within_network_of};
pub use processes::has_docker;
pub use rig::{Rig, is_root, program};
pub use scene::{SECRET, Scene};
pub use turn::{skip, turn};
pub use wait::{LIMIT, wait_for, wait_until};

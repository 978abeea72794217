//! The client's commands.

pub(crate) mod network;
pub(crate) mod node;
pub(crate) mod payload;
pub(crate) mod service;
pub(crate) mod swarm;
pub(crate) mod system;

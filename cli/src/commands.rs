//! The client's commands.

pub(crate) mod container;
pub(crate) mod image;
pub(crate) mod network;
pub(crate) mod node;
pub(crate) mod payload;
pub(crate) mod run;
pub(crate) mod service;
pub(crate) mod swarm;
pub(crate) mod system;
pub(crate) mod volume;

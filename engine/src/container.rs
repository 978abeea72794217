//! One container: its configuration, its spec, the shim that watches it, its output and health.

pub(crate) mod apparmor;
pub(crate) mod archive;
pub(crate) mod cdi;
pub(crate) mod config;
pub(crate) mod devices;
pub(crate) mod health;
pub(crate) mod id_map;
pub(crate) mod late_mounts;
pub(crate) mod logs;
pub(crate) mod restart;
pub(crate) mod rootfs;
pub(crate) mod runtime;
pub(crate) mod seccomp;
pub(crate) mod shim;
pub(crate) mod spec;
pub(crate) mod starter;
pub(crate) mod state;
pub(crate) mod storage;
pub(crate) mod streams;
pub(crate) mod targets;
pub(crate) mod user;

//! The engine of one host: containers, images, volumes and the bridge network. It knows nothing of
//! a swarm.
//!
//! Each container is watched by a small process of its own, the shim (the same binary), which
//! outlives the daemon: it keeps the output and the exit code. The daemon's death or restart
//! therefore stops no container and loses nothing; [`Engine::open`] finds them again.

mod build;
mod container;
mod disk;
mod engine;
mod image;
mod mounts;
mod network;
mod sys;
mod tree;
mod turns;
mod volume;

pub use build::{
    BuildClient, BuildError, BuildOptions, BuildOutput, BuildStep, ImageFiles, Lender, Lending, NamedContext,
    check_dockerfile, fetch, ignored_patterns, unpack_context,
};
pub use container::apparmor::{check_apparmor, has_apparmor, has_selinux};
pub use container::archive::{archive_in_main, archive_out_main};
pub use container::cdi::{CdiError, cdi_devices, is_cdi_name};
pub use container::config::{
    BlockLimit, BlockLimitKind, ContainerConfig, ContainerMount, Device, HealthCheck, JoinedNetwork, Link, MountSource,
    NamespaceMode, NetworkMode, Payload, PublishedPort, ResourceLimits, RestartPolicy, SharedMemory, log_attributes,
};
pub use container::devices::{block_device, holds_device, is_device_rule};
pub use container::health::HealthStatus;
pub use container::id_map::{IdMap, IdMapError, hold_namespace_main};
pub use container::late_mounts::late_mounts_main;
pub use container::logs::config::{LogConfig, LogConfigError, LogDriver, parse_size};
pub use container::logs::reader::{LogOptions, LogStream};
pub use container::logs::{LogLine, Stream as LogSource};
pub use container::rootfs::HOST_GATEWAY;
pub use container::runtime::ExternalRuntime;
pub use container::seccomp::seccomp_profile;
pub use container::shim::{exec_main, shim_main, watch_main};
pub use container::spec::is_capability;
pub use container::state::{ContainerState, Exit, Running};
pub use container::storage::StorageDriver;
pub use container::user::UserError;
pub use disk::{usage as bytes_below, write_whole};
pub use engine::{
    AddressPool, Archiving, Attachment, BlockCount, Change, CommitOptions, ContainerDefaults, Engine, EngineConfig,
    EngineError, EngineEvent, Exec, ExecSpec, ExecState, HistoryLine, InputWriter, Inspection, LocalNetworkSpec,
    NetworkRef, OutputReader, PathStat, Probe, RemoveOptions, Usage, Writing, link_parts,
};
pub use image::builtin::is_builtin;
pub use image::pull::{
    Credentials, CredentialsError, Proxies, PullError, PullProgress, RegistryConfig, Resolved, decode_header,
};
pub use image::push::Pushed;
pub use image::store::{Image, ImageConfig, Removal};
pub use image::unpack::UnpackError;
pub use image::{Platform, architecture, familiar, normalize, repository_path};
pub use network::{
    BridgeConfig, DEFAULT_NETWORK, Endpoint, Grant, HOST_BINDING, Ipv4Side, Ipv6Side, Joining, KeeperReply,
    KeptNetwork, LocalNetwork, MTU, MacAddress, NetworkKeeper, Parent, WantedPlace, forward_main,
};
pub use sys::{FreedMemory, host_name, let_go_of_code, take_short_turns, take_usual_turns};
pub use volume::{Volume, VolumeError};

//! The last steps before a container's program takes a process over.

use std::fs::{self, File};
use std::io::{self, IsTerminal as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use libcontainer::capabilities;
use libcontainer::oci_spec::runtime::{LinuxCapabilities, LinuxSeccomp, Spec};
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::workload::default::get_executor;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::unistd::{Gid, Uid};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use skep_api::with_causes;

use crate::container::{id_map, spec};
use crate::sys;

/// Gives up what the process still has too much of, puts a finished filter on, and runs the container's program.
///
/// Invariant: a program that has a filter never runs without it; what cannot be put on is an error.
#[derive(Clone)]
pub(crate) struct Starter {
    filter: Option<Arc<sys::Filter>>,
    descent: Option<Descent>,
    /// The user namespace to enter: its path is out of sight by then.
    users: Option<Arc<File>>,
}

impl Starter {
    pub(crate) fn new(filter: Option<&Path>, descent: Option<Descent>) -> Result<Self, String> {
        let read = |path: &Path| {
            let bytes = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
            sys::Filter::parse(&bytes).ok_or_else(|| format!("{} is damaged: remove it", path.display()))
        };
        let way_in = descent.as_ref().and_then(|descent| descent.way_in.as_ref());
        let users = way_in.map(|way_in| File::open(&way_in.namespace)).transpose();
        let users = users.map_err(|error| format!("the user namespace: {error}"))?;
        Ok(Self { filter: filter.map(read).transpose()?.map(Arc::new), descent, users: users.map(Arc::new) })
    }
}

impl Executor for Starter {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let fail = |what: &str, error: &dyn std::fmt::Display| ExecutorError::Other(format!("{what}: {error}"));
        let size = spec.process().as_ref().and_then(|process| process.console_size());
        if let Some(size) = size {
            let side = |number: u64| u16::try_from(number).unwrap_or(u16::MAX);
            // A terminal of no size is no reason not to run.
            drop(sys::set_terminal_size(&io::stdin(), side(size.height()), side(size.width())));
        }
        if let (Some(descent), Some(users)) = (&self.descent, &self.users) {
            descent.enter(users).map_err(|error| fail("the user namespace", &error))?;
        }
        if let Some(filter) = &self.filter {
            filter.install().map_err(|error| fail("the system-call filter", &error))?;
        }
        if let Some(descent) = &self.descent {
            descent.take_user().map_err(|error| fail("the user", &error))?;
        }
        get_executor().exec(spec)
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        get_executor().validate(spec)
    }
}

/// From the root of a container's users, with all capabilities, to the user that its program has.
///
/// libcontainer lets no further process into the user namespace of a container that runs. So in those that have one
/// it makes the process as root, and what is left to do is done here.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Descent {
    /// The runtime-spec's `process.user`, `process.capabilities` and `linux.seccomp`.
    user: Value,
    capabilities: Value,
    seccomp: Value,
    /// Where the process is not in its user namespace yet.
    way_in: Option<WayIn>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct WayIn {
    pub(crate) namespace: PathBuf,
    /// The host's user and group of a terminal's owner there.
    pub(crate) terminal: (u32, u32),
}

impl Descent {
    /// Takes out of a container's spec what is left to this.
    pub(crate) fn take_from(spec: &mut Value) -> Self {
        let seccomp = spec["linux"].as_object_mut().and_then(|linux| linux.remove("seccomp")).unwrap_or_default();
        Self { seccomp, ..Self::take_from_process(&mut spec["process"], None) }
    }

    /// The same, for a further process; its system calls are to be those of the container.
    pub(crate) fn of_process(&self, process: &mut Value, way_in: WayIn) -> Self {
        Self { seccomp: self.seccomp.clone(), ..Self::take_from_process(process, Some(way_in)) }
    }

    fn take_from_process(process: &mut Value, way_in: Option<WayIn>) -> Self {
        let all = spec::all_capabilities();
        let root = json!({"uid": 0, "gid": 0, "additionalGids": [], "umask": process["user"]["umask"]});
        let capabilities =
            json!({"bounding": all, "effective": all, "permitted": all, "inheritable": [], "ambient": []});
        Self {
            user: std::mem::replace(&mut process["user"], root),
            capabilities: std::mem::replace(&mut process["capabilities"], capabilities),
            seccomp: Value::Null,
            way_in,
        }
    }

    /// Puts back what was taken out of a container's process.
    pub(crate) fn give_back(&self, process: &mut Value) {
        process["user"].clone_from(&self.user);
        process["capabilities"].clone_from(&self.capabilities);
    }

    fn enter(&self, users: &File) -> io::Result<()> {
        if let Some(WayIn { terminal: (uid, gid), .. }) = self.way_in
            && io::stdin().is_terminal()
        {
            std::os::unix::fs::fchown(io::stdin(), Some(uid), Some(gid))?;
        }
        id_map::enter_user_namespace(users)
    }

    fn take_user(&self) -> Result<(), String> {
        let id = |member: &str| self.user[member].as_u64().and_then(|id| u32::try_from(id).ok()).unwrap_or(0);
        let groups = self.user["additionalGids"].as_array().map_or(&[][..], Vec::as_slice).iter();
        let groups: Vec<Gid> =
            groups.filter_map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).map(Gid::from_raw).collect();
        let capabilities: LinuxCapabilities =
            serde_json::from_value(self.capabilities.clone()).map_err(|error| error.to_string())?;
        if !self.seccomp.is_null() {
            let seccomp: LinuxSeccomp =
                serde_json::from_value(self.seccomp.clone()).map_err(|error| error.to_string())?;
            libcontainer::seccomp::initialize_seccomp(&seccomp).map_err(|error| with_causes(&error))?;
        }
        take_ids(Uid::from_raw(id("uid")), Gid::from_raw(id("gid")), &groups).map_err(|error| error.to_string())?;
        let syscall = create_syscall();
        let text = |error: libcontainer::syscall::SyscallError| with_causes(&error);
        capabilities::reset_effective(syscall.as_ref()).map_err(text)?;
        capabilities::drop_privileges(&capabilities, syscall.as_ref()).map_err(text)
    }
}

/// Becomes a user, with all capabilities kept.
fn take_ids(uid: Uid, gid: Gid, groups: &[Gid]) -> nix::Result<()> {
    nix::sys::prctl::set_keepcaps(true)?;
    nix::unistd::setgroups(groups)?;
    nix::unistd::setresgid(gid, gid, gid)?;
    nix::unistd::setresuid(uid, uid, uid)?;
    nix::sys::prctl::set_keepcaps(false)
}

//! `--security-opt`: what a container may, beyond its capabilities.

use serde_json::Value;

use crate::http::ApiError;

/// What the options come to.
#[derive(Debug)]
pub(super) struct Security {
    /// The daemon's default if not said.
    pub(super) no_new_privileges: Option<bool>,
    /// Whether the default system-call filter is on.
    pub(super) seccomp: bool,
    /// Another one, as the runtime-spec has it; null if there is none.
    pub(super) profile: Value,
    /// The AppArmor profile; empty: the engine's own.
    pub(super) apparmor: String,
}

pub(super) fn read(options: &[String]) -> Result<Security, ApiError> {
    let mut security =
        Security { no_new_privileges: None, seccomp: true, profile: Value::Null, apparmor: String::new() };
    for option in options {
        let (key, value) = option.split_once(['=', ':']).unwrap_or((option, ""));
        match (key, value) {
            ("no-new-privileges", "" | "true") => security.no_new_privileges = Some(true),
            ("no-new-privileges", "false") => security.no_new_privileges = Some(false),
            ("seccomp", "unconfined") => security.seccomp = false,
            ("seccomp", "builtin") | ("label", "disable") => {}
            ("label", label) => check_label(label)?,
            ("seccomp", json) => {
                let profile: Value = serde_json::from_str(json)
                    .map_err(|error| ApiError::bad_request(format!("the seccomp profile cannot be read: {error}")))?;
                security.profile = skep_engine::seccomp_profile(&profile)
                    .map_err(|error| ApiError::bad_request(format!("the seccomp profile cannot be used: {error}")))?;
            }
            ("apparmor", name) => {
                skep_engine::check_apparmor(name).map_err(ApiError::bad_request)?;
                security.apparmor = name.to_owned();
            }
            _ => return Err(ApiError::bad_request(format!("invalid --security-opt: {option:?}"))),
        }
    }
    Ok(security)
}

/// Without SELinux there is nothing that could have a label, and clients that name one get what they would have from
/// Docker; with it they would take a container for confined that is not.
fn check_label(label: &str) -> Result<(), ApiError> {
    let kind = label.split(':').next().unwrap_or_default();
    if !["user", "role", "type", "level", "filetype", "nested"].contains(&kind) {
        return Err(ApiError::bad_request(format!("invalid --security-opt: label={label:?} is of no known kind")));
    }
    if skep_engine::has_selinux() {
        return Err(ApiError::unsupported(format!(
            "the label {label:?} cannot be given, as SELinux is not supported yet: leave it out, or say label=disable"
        )));
    }
    Ok(())
}

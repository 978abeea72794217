//! What we log in to registries with: docker's config.json and its credential helpers, so that a login
//! of either client serves both.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context as _, bail};
use base64::Engine as _;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE};
use serde_json::{Map, Value, json};

/// What docker calls its own registry in the file.
const HUB: &str = "https://index.docker.io/v1/";
/// A helper says so in the place of the user's name.
const TOKEN_USER: &str = "<token>";
/// How a helper says that it has nothing.
const NOT_FOUND: &str = "credentials not found";

/// The file, as it was read; what we do not know of it is kept.
pub(crate) struct Config {
    path: PathBuf,
    content: Value,
}

/// Where it is kept, if that was said.
static DIR: OnceLock<PathBuf> = OnceLock::new();

impl Config {
    /// Has it kept elsewhere than the environment says.
    pub(crate) fn keep_in(dir: PathBuf) {
        // It is said once at most: at the start.
        let _ = DIR.set(dir);
    }

    /// Where docker's client keeps what is its user's.
    pub(crate) fn dir() -> anyhow::Result<PathBuf> {
        let dir = DIR.get().cloned().or_else(|| std::env::var_os("DOCKER_CONFIG").map(PathBuf::from));
        let dir = dir.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".docker")));
        dir.context("neither DOCKER_CONFIG nor HOME says where the client's configuration is kept")
    }

    /// The context that is used where nothing else is said.
    pub(crate) fn context(&self) -> Option<&str> {
        self.content["currentContext"].as_str().filter(|name| !name.is_empty())
    }

    /// Has another context used from now on.
    pub(crate) fn set_context(&mut self, name: &str) -> anyhow::Result<()> {
        if let Some(members) = self.content.as_object_mut() {
            members.remove("currentContext");
            if name != crate::context::DEFAULT {
                members.insert("currentContext".into(), name.into());
            }
        }
        self.write()
    }

    pub(crate) fn load() -> anyhow::Result<Self> {
        let path = Self::dir()?.join("config.json");
        let content = match std::fs::read(&path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).with_context(|| format!("{} cannot be read", path.display()))?
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => json!({}),
            Err(error) => return Err(error).with_context(|| format!("{} cannot be read", path.display())),
        };
        anyhow::ensure!(content.is_object(), "{} holds no object", path.display());
        Ok(Self { path, content })
    }

    /// The `X-Registry-Auth` of requests about an image; `None` if we are not logged in there.
    pub(crate) fn header_for_image(image: &str) -> anyhow::Result<Option<String>> {
        let found = Self::load()?.find(&registry_of(image))?;
        Ok(found.map(|auth| BASE64_URL_SAFE.encode(auth.to_string())))
    }

    /// The `X-Registry-Config` of builds: all we have, by registry.
    pub(crate) fn header_for_build() -> anyhow::Result<String> {
        let config = Self::load()?;
        let members = |key: &str| config.content[key].as_object().into_iter().flatten().map(|(name, _)| name.clone());
        let mut all = Map::new();
        for registry in members("auths").chain(members("credHelpers")) {
            if let Some(auth) = config.find(&registry)? {
                all.insert(registry, auth);
            }
        }
        Ok(BASE64_URL_SAFE.encode(Value::Object(all).to_string()))
    }

    fn helper(&self, registry: &str) -> Option<&str> {
        let name = self.content["credHelpers"][registry].as_str().or_else(|| self.content["credsStore"].as_str());
        name.filter(|name| !name.is_empty())
    }

    /// What we have for a registry, as the API takes it.
    fn find(&self, registry: &str) -> anyhow::Result<Option<Value>> {
        if let Some(helper) = self.helper(registry) {
            let Some(answer) = ask_helper(helper, "get", registry)? else { return Ok(None) };
            let answer: Value = serde_json::from_str(&answer)
                .with_context(|| format!("the answer of docker-credential-{helper} cannot be read"))?;
            let secret = &answer["Secret"];
            return Ok(Some(match answer["Username"].as_str() {
                Some(TOKEN_USER) => json!({"identitytoken": secret, "serveraddress": registry}),
                _ => json!({"username": answer["Username"], "password": secret, "serveraddress": registry}),
            }));
        }
        let entry = &self.content["auths"][registry];
        if let Some(token) = entry["identitytoken"].as_str().filter(|token| !token.is_empty()) {
            return Ok(Some(json!({"identitytoken": token, "serveraddress": registry})));
        }
        let Some(auth) = entry["auth"].as_str().filter(|auth| !auth.is_empty()) else { return Ok(None) };
        let wrong = || format!("the credentials of {registry} in {} cannot be read: log in again", self.path.display());
        let plain = String::from_utf8(BASE64_STANDARD.decode(auth).with_context(wrong)?).with_context(wrong)?;
        let (user, password) = plain.trim_end_matches('\0').split_once(':').with_context(wrong)?;
        Ok(Some(json!({"username": user, "password": password, "serveraddress": registry})))
    }

    /// Keeps what a login came to, with a helper if one is configured; true if it lies in the file itself.
    pub(crate) fn keep(&mut self, registry: &str, auth: &Value) -> anyhow::Result<bool> {
        let text = |key: &str| auth[key].as_str().unwrap_or_default();
        let token = text("identitytoken");
        if let Some(helper) = self.helper(registry) {
            let (user, secret) =
                if token.is_empty() { (text("username"), text("password")) } else { (TOKEN_USER, token) };
            let entry = json!({"ServerURL": registry, "Username": user, "Secret": secret});
            ask_helper(helper, "store", &entry.to_string())?;
            self.content["auths"][registry] = json!({});
            return self.write().map(|()| false);
        }
        let plain = format!("{}:{}", text("username"), text("password"));
        self.content["auths"][registry] = if token.is_empty() {
            json!({"auth": BASE64_STANDARD.encode(plain)})
        } else {
            json!({"auth": BASE64_STANDARD.encode(format!("{}:", text("username"))), "identitytoken": token})
        };
        self.write().map(|()| true)
    }

    /// Forgets a registry; false if nothing was known of it.
    pub(crate) fn forget(&mut self, registry: &str) -> anyhow::Result<bool> {
        let known = self.find(registry)?.is_some();
        if let Some(helper) = self.helper(registry) {
            ask_helper(helper, "erase", registry)?;
        }
        let entry = self.content["auths"].as_object_mut().and_then(|auths| auths.remove(registry));
        if entry.is_some() {
            self.write()?;
        }
        Ok(known || entry.is_some())
    }

    /// Replaces the file whole: nobody else may read it, and no crash leaves half of it.
    fn write(&self) -> anyhow::Result<()> {
        let failed = || format!("{} cannot be written", self.path.display());
        if let Some(dir) = self.path.parent() {
            std::fs::create_dir_all(dir).with_context(failed)?;
        }
        // A link stays one: people keep this file elsewhere.
        let path = std::fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        let next = path.with_extension(format!("json.{}", std::process::id()));
        let mut file = std::fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&next)?;
        file.write_all(serde_json::to_string_pretty(&self.content)?.as_bytes()).with_context(failed)?;
        std::fs::rename(&next, &path).with_context(failed)
    }
}

/// Asks a credential helper; `None` if it says that it has nothing.
fn ask_helper(helper: &str, verb: &str, input: &str) -> anyhow::Result<Option<String>> {
    let program = format!("docker-credential-{helper}");
    let asked =
        Command::new(&program).arg(verb).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().and_then(|mut child| {
            child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()))?;
            child.wait_with_output()
        });
    let output = asked.with_context(|| format!("credential helper {program} does not run: is it installed?"))?;
    let answer = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(Some(answer));
    }
    if answer.contains(NOT_FOUND) {
        return Ok(None);
    }
    bail!("credential helper {program} {verb}: {}", answer.trim());
}

/// The registry that an image comes from, as the file names it.
fn registry_of(image: &str) -> String {
    match image.split_once('/') {
        Some((first, _)) if first.contains(['.', ':']) || first == "localhost" => registry_name(first),
        _ => HUB.to_owned(),
    }
}

/// A registry as the file names it, from what a user calls it.
pub(crate) fn registry_name(server: &str) -> String {
    let bare = server.trim_start_matches("https://").trim_start_matches("http://");
    let host = bare.split('/').next().unwrap_or(bare);
    match host {
        "" | "docker.io" | "index.docker.io" => HUB.to_owned(),
        host => host.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(content: Value) -> (tempfile::TempDir, Config) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("docker/config.json");
        (dir, Config { path, content })
    }

    #[test]
    fn registries_are_named_as_docker_names_them() {
        for (image, want) in [
            ("busybox", HUB),
            ("library/busybox:1", HUB),
            ("docker.io/library/busybox", HUB),
            ("registry.example:5000/a/b:1", "registry.example:5000"),
            ("localhost/a", "localhost"),
        ] {
            assert_eq!(registry_of(image), want, "{image}");
        }
        assert_eq!(registry_name("https://registry.example/v2/"), "registry.example");
    }

    #[test]
    fn what_is_kept_is_found_again_and_forgotten_on_request() {
        let (_dir, mut config) = config(json!({"HttpHeaders": {"X": "y"}}));
        let auth = json!({"username": "ann", "password": "se:cret"});
        assert!(config.keep("registry.example", &auth).unwrap());
        let again = Config {
            path: config.path.clone(),
            content: serde_json::from_slice(&std::fs::read(&config.path).unwrap()).unwrap(),
        };
        let found = again.find("registry.example").unwrap().unwrap();
        assert_eq!((&found["username"], &found["password"]), (&json!("ann"), &json!("se:cret")));
        assert_eq!(again.content["HttpHeaders"]["X"], "y", "the rest of the file stays");
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&config.path).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o600);
        assert!(config.forget("registry.example").unwrap());
        assert!(!config.forget("registry.example").unwrap());
        assert!(config.find("registry.example").unwrap().is_none());
    }

    #[test]
    fn damaged_credentials_and_missing_helpers_are_told() {
        let (_dir, config) = config(json!({
            "auths": {"a.example": {"auth": "!"}}, "credHelpers": {"b.example": "none-such"},
        }));
        assert!(config.find("a.example").unwrap_err().to_string().contains("log in again"));
        assert!(config.find("b.example").unwrap_err().to_string().contains("docker-credential-none-such"));
    }
}

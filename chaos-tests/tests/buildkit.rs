//! Builds by the stock client with BuildKit (buildx), and Compose's plugin: as Debian has them, unchanged.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use skep_chaos_tests::{LIMIT, Ran, Rig, has_docker, skip, take_turn, wait_until};

/// Where the system or `scripts/bootstrap` puts plugins.
const PLUGINS: [&str; 4] = [
    concat!(env!("CARGO_MANIFEST_DIR"), "/../target/cli-plugins"),
    "/usr/libexec/docker/cli-plugins",
    "/usr/lib/docker/cli-plugins",
    "/usr/local/lib/docker/cli-plugins",
];

/// A host with busybox, and a client that has plugins.
struct Scene {
    rig: Rig,
    config: PathBuf,
    context: PathBuf,
}

impl Scene {
    /// None: there are no plugins here.
    fn new() -> Option<Self> {
        if !has_docker() {
            return None;
        }
        let found = |name: &str| PLUGINS.iter().map(|dir| Path::new(dir).join(name)).find(|path| path.exists());
        let (Some(buildx), Some(compose)) = (found("docker-buildx"), found("docker-compose")) else {
            skip("docker's plugins buildx and compose are not installed");
            return None;
        };
        let rig = Rig::new(1);
        rig.host(1).start_daemon();
        rig.host(1).import_busybox();
        let (config, context) = (rig.host(1).dir().join("docker"), rig.host(1).dir().join("context"));
        fs::create_dir_all(config.join("cli-plugins")).unwrap();
        fs::create_dir(&context).unwrap();
        symlink(buildx, config.join("cli-plugins/docker-buildx")).unwrap();
        symlink(compose, config.join("cli-plugins/docker-compose")).unwrap();
        Some(Self { rig, config, context })
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.context.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// The client, in the directory of the context.
    fn client(&self, args: &[&str]) -> Command {
        let mut client = Command::new("docker");
        client.env("DOCKER_CONFIG", &self.config).env("DOCKER_HOST", self.rig.host(1).socket()).args(args);
        client.env_remove("DOCKER_BUILDKIT").env("BUILDKIT_PROGRESS", "plain").current_dir(&self.context);
        client.stdin(Stdio::null());
        client
    }

    fn run(&self, args: &[&str]) -> Ran {
        let output = self.client(args).output().expect("docker is installed");
        Ran {
            success: output.status.success(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// All that it says; it must succeed.
    fn docker(&self, args: &[&str]) -> String {
        let ran = self.run(args);
        assert!(ran.success, "docker {args:?}: {}{}\n{}", ran.stdout, ran.stderr, self.rig.host(1).log());
        ran.stdout + &ran.stderr
    }

    fn fails(&self, args: &[&str], want: &str) {
        let ran = self.run(args);
        let said = ran.stdout + &ran.stderr;
        assert!(!ran.success && said.contains(want), "docker {args:?} should say {want:?}: {said}");
    }
}

const STAGES: &str = r#"
FROM busybox AS words
ARG WORD=none
RUN echo $WORD > /word; echo said; echo wrong >&2
FROM other AS secrets
RUN --mount=type=secret,id=pass,required cp /run/secrets/pass /pass
FROM busybox
WORKDIR /work
COPY . .
COPY --from=words /word .
COPY --from=secrets /pass .
COPY --from=lib part lib/
RUN --mount=from=lib,target=/lib2 cat /lib2/part > seen
LABEL colour=red
CMD ["find", ".", "-type", "f"]
"#;

#[test]
fn the_stock_client_builds_with_buildkit() {
    take_turn!();
    let Some(scene) = Scene::new() else { return };
    scene.write("elsewhere/own.Dockerfile", STAGES);
    scene.write("app/.dockerignore", "*.log\n!kept.log\nsecret\n");
    for file in ["app/a.txt", "app/b.log", "app/kept.log", "app/secret/key", "app/deep/er/c", "lib/part"] {
        scene.write(file, file);
    }
    scene.write("pass", "hush");
    let build = [
        "build",
        "-t",
        "one",
        "-t",
        "two:x",
        "-f",
        "elsewhere/own.Dockerfile",
        "--build-arg",
        "WORD=spoken",
        "--secret",
        "id=pass,src=pass",
        "--build-context",
        "lib=lib",
        "--build-context",
        "other=docker-image://busybox",
        "--label",
        "size=big",
        "--iidfile",
        "iid",
        "app",
    ];
    let told = scene.docker(&build);
    for part in
        ["using docker driver", "[words 2/2] RUN echo $WORD", "said", "wrong", "naming to docker.io/library/one:latest"]
    {
        assert!(told.contains(part), "{part:?} is not told: {told}");
    }
    let host = scene.rig.host(1);
    let mut files: Vec<_> = host.ok(&["run", "--rm", "two:x"]).lines().map(str::to_owned).collect();
    files.sort();
    let want = ["./.dockerignore", "./a.txt", "./deep/er/c", "./kept.log", "./lib/part", "./pass", "./seen", "./word"];
    assert_eq!(files, want);
    let id = fs::read_to_string(scene.context.join("iid")).unwrap();
    let facts = host.ok(&["image", "inspect", &id, "--format", "{{.RepoTags}} {{.Config.Labels}}"]);
    assert_eq!(facts.trim(), "[one:latest two:x] map[colour:red size:big]");
    let again = scene.docker(&build);
    assert_eq!(again.matches("CACHED").count(), 8, "{again}");
    assert_eq!(fs::read_to_string(scene.context.join("iid")).unwrap(), id);
    // What changes nothing but a file makes a new image of the old steps and that one.
    scene.write("app/a.txt", "other");
    let changed = scene.docker(&build);
    assert_eq!(changed.matches("CACHED").count(), 3, "{changed}");
    assert_eq!(host.ok(&["run", "--rm", "one", "cat", "a.txt", "word", "pass"]), "otherspoken\nhush");
}

#[test]
fn what_goes_wrong_is_told_and_leaves_nothing() {
    take_turn!();
    let Some(scene) = Scene::new() else { return };
    let host = scene.rig.host(1);
    scene.write("Dockerfile", "FROM busybox AS base\nRUN echo before; exit 3\nFROM base AS fine\n");
    scene.fails(&["build", "."], "did not complete successfully: exit code: 3");
    scene.write("Dockerfile", "FROM busybox\nRUN true\nRANU true\n");
    scene.fails(&["build", "."], "RANU");
    scene.write("Dockerfile", "FROM busybox\nCOPY none /\n");
    scene.fails(&["build", "."], "none");
    scene.fails(&["build", "-f", "Nofile", "."], "Nofile");
    scene.write("Dockerfile", "FROM busybox\nRUN --mount=type=secret,id=pass,required true\n");
    scene.fails(&["build", "."], "pass: not found");
    scene.fails(&["build", "--target", "nosuch", "."], "nosuch");
    scene.fails(&["build", "--output", "type=registry", "."], "registry");
    // Who gives up leaves no container behind, though it says nothing.
    scene.write("Dockerfile", "FROM busybox\nRUN echo begun; sleep 1000\n");
    let client = scene.client(&["build", "."]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let client = Ending(client);
    wait_until("the step runs", LIMIT, || {
        let list = host.ok(&["ps", "-q"]);
        (!list.is_empty(), list)
    });
    drop(client);
    wait_until("the step is gone", LIMIT, || {
        let list = host.ok(&["ps", "-a", "-q"]);
        (list.is_empty(), list)
    });
    wait_until("what it was built of is gone", LIMIT, || {
        let left = fs::read_dir(host.data().join("tmp")).unwrap().count();
        (left == 0, left.to_string())
    });
}

#[test]
fn a_build_s_files_go_to_the_client() {
    take_turn!();
    let Some(scene) = Scene::new() else { return };
    scene.write("Dockerfile", "FROM busybox AS made\nRUN mkdir -p /out/d && echo x > /out/d/f && chmod 750 /out/d/f && ln -s f /out/d/l\nFROM scratch\nCOPY --from=made /out /\n");
    scene.docker(&["build", "--output", "got", "."]);
    let got = scene.context.join("got");
    assert_eq!(fs::read_to_string(got.join("d/l")).unwrap(), "x\n");
    assert_eq!(fs::read_link(got.join("d/l")).unwrap(), Path::new("f"));
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(got.join("d/f")).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o750);
    scene.docker(&["build", "--output", "type=tar,dest=got.tar", "."]);
    let listed = Command::new("tar").arg("tf").arg(scene.context.join("got.tar")).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&listed.stdout), "d/\nd/f\nd/l\n");
}

/// A program that goes with its test, however that ends.
struct Ending(Child);

impl Drop for Ending {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn steps_reach_the_client_s_ssh_agent() {
    take_turn!();
    let Some(scene) = Scene::new() else { return };
    let agent = scene.context.join("agent");
    let serving = Command::new("ssh-agent").arg("-D").arg("-a").arg(&agent).stdout(Stdio::null()).spawn().unwrap();
    let _serving = Ending(serving);
    wait_until("the agent runs", LIMIT, || (agent.exists(), String::new()));
    let run = |program: &str, args: &[&str]| {
        let ran = Command::new(program).args(args).env("SSH_AUTH_SOCK", &agent).current_dir(&scene.context).output();
        let ran = ran.expect("OpenSSH is installed (package openssh-client)");
        assert!(ran.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&ran.stderr));
        String::from_utf8_lossy(&ran.stdout).into_owned()
    };
    run("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-C", "a key", "-f", "key"]);
    run("ssh-add", &["-q", "key"]);
    // The program that asks the agent, and what it is linked to.
    let libraries = run("ldd", &["/usr/bin/ssh-add"]);
    for path in libraries.split_whitespace().filter(|word| word.starts_with('/')).chain(["/usr/bin/ssh-add"]) {
        let inside = scene.context.join(path.trim_start_matches('/'));
        fs::create_dir_all(inside.parent().unwrap()).unwrap();
        fs::copy(path, inside).unwrap();
    }
    scene.write(
        "Dockerfile",
        "FROM busybox\nCOPY . /\nRUN --mount=type=ssh /usr/bin/ssh-add -l | grep 'a key'\nRUN test -z \"$SSH_AUTH_SOCK\" && ! ls /run/buildkit\n",
    );
    let socket = format!("default={}", agent.display());
    let told = scene.docker(&["build", "--ssh", &socket, "."]);
    assert!(told.contains("a key (ED25519)"), "{told}");
    scene.write("Dockerfile", "FROM busybox\nRUN --mount=type=ssh,required true\n");
    scene.fails(&["build", "."], "SSH agent default: not found");
}

const PROJECT: &str = r#"
name: shop
services:
  web:
    build:
      context: .
      args: { WORD: hello }
      additional_contexts: { lib: ./lib }
    command: httpd -f -p 80 -h /www
    healthcheck: { test: wget -q -O - http://127.0.0.1/word, interval: 1s, retries: 20 }
    ports: ["127.0.0.1:8080:80"]
    configs: [{ source: settings, target: /etc/settings }]
  asks:
    image: busybox
    command: wget -q -O - http://web/word
    depends_on: { web: { condition: service_healthy } }
configs:
  settings: { content: "mode=fast" }
"#;

#[test]
fn a_project_of_compose_s_plugin_is_built_and_comes_up() {
    take_turn!();
    let Some(scene) = Scene::new() else { return };
    scene.write("compose.yml", PROJECT);
    scene.write("lib/part", "part");
    scene.write(
        "Dockerfile",
        "FROM busybox\nARG WORD\nRUN mkdir /www && echo $WORD > /www/word\nCOPY --from=lib part /www/\n",
    );
    scene.docker(&["compose", "up", "--build", "--wait", "--wait-timeout", "60", "web"]);
    let host = scene.rig.host(1);
    assert_eq!(host.curl("http://127.0.0.1:8080/part"), "part");
    assert_eq!(scene.docker(&["compose", "exec", "-T", "web", "cat", "/etc/settings"]), "mode=fast");
    let told = scene.docker(&["compose", "up", "--no-log-prefix", "--exit-code-from", "asks", "asks"]);
    assert!(told.contains("hello"), "{told}");
    // The plugins are commands of ours, too.
    let config = scene.config.display().to_string();
    assert!(host.ok(&["--config", &config, "buildx", "ls"]).contains("running"));
    let project = format!("{}/compose.yml", scene.context.display());
    assert!(host.ok(&["--config", &config, "compose", "-f", &project, "ps"]).contains("shop-web-1"));
    assert!(host.fails(&["--config", &config, "composer", "up"]).contains("no plugin docker-composer"));
    scene.docker(&["compose", "down", "-t", "0"]);
    assert!(host.ok(&["ps", "-a", "-q"]).is_empty());
}

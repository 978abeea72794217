//! Go's templates, as far as people use them for what a client prints and what differs from task to task: fields, `range`, `if`,
//! `with`, variables, pipelines, and the functions that docker's client has.

mod functions;

use std::collections::BTreeMap;

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};

use self::functions::{FUNCTIONS, call};

/// Deeper nesting is nobody's.
const DEPTH_MAX: usize = 64;
/// What filling a template may take, however its ranges are nested.
const STEPS_MAX: usize = 1_000_000;
/// As long as a text may become.
const LEN_MAX: usize = 16 << 20;

/// Why a template cannot be filled.
#[derive(Debug, thiserror::Error)]
#[error("{0:#}")]
pub struct TemplateError(anyhow::Error);

/// Functions of a template's own: what one of this name makes of its arguments, if there is one.
pub type Functions<'a> = &'a dyn Fn(&str, &[Value]) -> Option<Result<Value, String>>;

/// Fills a template with a value.
pub fn render(template: &str, value: &Value) -> Result<String, TemplateError> {
    let filled = render_with(template, value, &|_, _| None);
    filled.map_err(|error| TemplateError(error.0.context(format!("template {template:?}"))))
}

/// Whether a template can be read at all; what it names may still be missing.
pub fn check(template: &str) -> Result<(), TemplateError> {
    nodes(template).map(drop).map_err(TemplateError)
}

fn nodes(template: &str) -> anyhow::Result<Vec<Node>> {
    let pieces = pieces(template)?;
    let (nodes, end) = parse(&mut pieces.as_slice(), 0)?;
    ensure!(end.is_none(), "{{{{{}}}}} without a beginning", end.unwrap_or_default());
    Ok(nodes)
}

/// Fills a template with a value; it may call more functions than usual. The template may be a secret: errors do not repeat it
/// as a whole.
pub fn render_with(template: &str, value: &Value, functions: Functions<'_>) -> Result<String, TemplateError> {
    let filled = || {
        let nodes = nodes(template)?;
        let mut scope = Scope { variables: vec![("$".to_owned(), value.clone())], functions, steps: 0 };
        let mut text = String::new();
        execute(&nodes, value, &mut scope, &mut text)?;
        anyhow::Ok(text)
    };
    filled().map_err(TemplateError)
}

/// Text, or what stands between braces.
#[derive(Debug, Clone, PartialEq)]
enum Piece {
    Text(String),
    Action(String),
}

fn pieces(template: &str) -> anyhow::Result<Vec<Piece>> {
    let (mut pieces, mut rest, mut trim) = (Vec::new(), template, false);
    loop {
        let (before, after) = rest.split_once("{{").map_or((rest, None), |(before, after)| (before, Some(after)));
        let mut text = before.to_owned();
        if trim {
            text = text.trim_start().to_owned();
        }
        let Some(after) = after else {
            pieces.push(Piece::Text(text));
            return Ok(pieces);
        };
        let (action, after) = after.split_once("}}").context("{{ without }}")?;
        if let Some(own) = action.strip_prefix("- ") {
            pieces.push(Piece::Text(text.trim_end().to_owned()));
            pieces.push(Piece::Action(own.to_owned()));
        } else {
            pieces.push(Piece::Text(text));
            pieces.push(Piece::Action(action.to_owned()));
        }
        trim = action.ends_with(" -");
        if let (true, Some(Piece::Action(action))) = (trim, pieces.last_mut()) {
            action.truncate(action.len() - 2);
        }
        rest = after;
    }
}

#[derive(Debug, Clone)]
enum Node {
    Text(String),
    Print(Pipeline),
    Set(String, Pipeline),
    If(Pipeline, Vec<Self>, Vec<Self>),
    With(Pipeline, Vec<Self>, Vec<Self>),
    Range { names: Vec<String>, over: Pipeline, each: Vec<Self>, none: Vec<Self> },
}

/// Reads up to an `end` or `else`, which is returned.
fn parse(rest: &mut &[Piece], depth: usize) -> anyhow::Result<(Vec<Node>, Option<String>)> {
    ensure!(depth < DEPTH_MAX, "it is nested too deeply");
    let mut nodes = Vec::new();
    while let Some((piece, after)) = rest.split_first() {
        *rest = after;
        let action = match piece {
            Piece::Text(text) => {
                nodes.push(Node::Text(text.clone()));
                continue;
            }
            Piece::Action(action) => action.trim(),
        };
        let (word, more) = action.split_once(char::is_whitespace).unwrap_or((action, ""));
        match word {
            "end" | "else" => return Ok((nodes, Some(action.to_owned()))),
            _ if action.starts_with("/*") => {}
            "if" | "with" | "range" => nodes.push(parse_block(word, more, rest, depth)?),
            _ => {
                let (names, pipeline) = declared(action)?;
                nodes.push(match names.as_slice() {
                    [] => Node::Print(pipeline),
                    [name] => Node::Set(name.clone(), pipeline),
                    _ => bail!("{{{{{action}}}}} sets several variables: range alone does"),
                });
            }
        }
    }
    Ok((nodes, None))
}

fn parse_block(word: &str, head: &str, rest: &mut &[Piece], depth: usize) -> anyhow::Result<Node> {
    let (names, pipeline) = declared(head)?;
    let (body, end) = parse(rest, depth + 1)?;
    let mut other = Vec::new();
    match end.as_deref().map(|end| end.split_once(char::is_whitespace).unwrap_or((end, ""))) {
        Some(("end", _)) => {}
        Some(("else", "")) => {
            let (nodes, end) = parse(rest, depth + 1)?;
            ensure!(end.as_deref() == Some("end"), "{{{{{word}}}}} has no {{{{end}}}}");
            other = nodes;
        }
        Some(("else", more)) => {
            let (again, head) = more.split_once(char::is_whitespace).unwrap_or((more, ""));
            ensure!(again == word, "{{{{else {more}}}}} does not go with {{{{{word}}}}}");
            other.push(parse_block(word, head, rest, depth + 1)?);
        }
        _ => bail!("{{{{{word}}}}} has no {{{{end}}}}"),
    }
    Ok(match word {
        "if" => Node::If(pipeline, body, other),
        "with" => Node::With(pipeline, body, other),
        _ => Node::Range { names, over: pipeline, each: body, none: other },
    })
}

/// `$a, $b := pipeline`, or a pipeline alone.
fn declared(text: &str) -> anyhow::Result<(Vec<String>, Pipeline)> {
    let (names, text) = match text.split_once(":=").or_else(|| text.split_once(" = ")) {
        Some((names, text)) if names.trim_start().starts_with('$') => {
            (names.split(',').map(|name| name.trim().to_owned()).collect(), text)
        }
        _ => (Vec::new(), text),
    };
    let tokens = tokens(text)?;
    let mut rest = tokens.as_slice();
    let pipeline = Pipeline::parse(&mut rest, 0)?;
    ensure!(rest.is_empty(), "{text:?} goes on after its end");
    Ok((names, pipeline))
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    /// A name, a field, a variable, a number.
    Word(String),
    Text(String),
    Pipe,
    Open,
    Close,
}

fn tokens(text: &str) -> anyhow::Result<Vec<Token>> {
    let mut tokens = Vec::new();
    let mut chars = text.chars().peekable();
    while let Some(&next) = chars.peek() {
        match next {
            _ if next.is_whitespace() => drop(chars.next()),
            '|' | '(' | ')' => {
                chars.next();
                tokens.push(match next {
                    '|' => Token::Pipe,
                    '(' => Token::Open,
                    _ => Token::Close,
                });
            }
            '"' | '`' => {
                chars.next();
                let mut string = String::new();
                loop {
                    match chars.next().with_context(|| format!("{text:?} has a text without an end"))? {
                        end if end == next => break,
                        '\\' if next == '"' => string.push(match chars.next().unwrap_or('\\') {
                            'n' => '\n',
                            't' => '\t',
                            other => other,
                        }),
                        other => string.push(other),
                    }
                }
                tokens.push(Token::Text(string));
            }
            _ => {
                let mut word = String::new();
                while let Some(&part) = chars.peek().filter(|part| !part.is_whitespace() && !"|()\"`".contains(**part))
                {
                    word.push(part);
                    chars.next();
                }
                tokens.push(Token::Word(word));
            }
        }
    }
    Ok(tokens)
}

/// Commands, each of which gets what the one before came to as its last argument.
#[derive(Debug, Clone)]
struct Pipeline(Vec<Vec<Operand>>);

#[derive(Debug, Clone)]
enum Operand {
    Word(String),
    Text(String),
    /// With the fields that are taken of what it comes to.
    Nested(Pipeline, String),
}

impl Pipeline {
    fn parse(rest: &mut &[Token], depth: usize) -> anyhow::Result<Self> {
        ensure!(depth < DEPTH_MAX, "it is nested too deeply");
        let mut commands = vec![Vec::new()];
        while let Some((token, after)) = rest.split_first() {
            if *token == Token::Close {
                break;
            }
            *rest = after;
            let command = commands.last_mut().expect("there is always one");
            match token {
                Token::Pipe => commands.push(Vec::new()),
                Token::Word(word) => command.push(Operand::Word(word.clone())),
                Token::Text(text) => command.push(Operand::Text(text.clone())),
                Token::Open | Token::Close => {
                    let nested = Self::parse(rest, depth + 1)?;
                    let Some((Token::Close, after)) = rest.split_first() else { bail!("( without )") };
                    *rest = after;
                    let mut fields = String::new();
                    if let Some((Token::Word(word), after)) = rest.split_first()
                        && word.starts_with('.')
                    {
                        fields.clone_from(word);
                        *rest = after;
                    }
                    command.push(Operand::Nested(nested, fields));
                }
            }
        }
        ensure!(
            commands.iter().all(|command| !command.is_empty()),
            "{{{{}}}} says nothing: write a field such as .Name"
        );
        Ok(Self(commands))
    }

    fn run(&self, dot: &Value, scope: &Scope<'_>) -> anyhow::Result<Value> {
        let mut last = None;
        for command in &self.0 {
            let is_function = |word: &str| word.starts_with(char::is_alphabetic) && literal(word).is_none();
            last = Some(match command.as_slice() {
                [Operand::Word(name), arguments @ ..] if is_function(name) => {
                    let arguments = arguments.iter().map(|argument| argument.value(dot, scope));
                    let arguments = arguments.chain(last.take().map(Ok)).collect::<anyhow::Result<Vec<_>>>()?;
                    scope.call(name, &arguments)?
                }
                [only] if last.is_none() => only.value(dot, scope)?,
                _ => bail!("a function is missing before its arguments: one of {}", FUNCTIONS.join(", ")),
            });
            let len = last.as_ref().and_then(Value::as_str).map_or(0, str::len);
            ensure!(len <= LEN_MAX, "a text becomes longer than {LEN_MAX} bytes");
        }
        Ok(last.unwrap_or_default())
    }
}

fn literal(word: &str) -> Option<Value> {
    match word {
        "true" => Some(json!(true)),
        "false" => Some(json!(false)),
        "nil" => Some(Value::Null),
        _ => serde_json::from_str(word).ok().filter(Value::is_number),
    }
}

impl Operand {
    fn value(&self, dot: &Value, scope: &Scope<'_>) -> anyhow::Result<Value> {
        match self {
            Self::Text(text) => Ok(json!(text)),
            Self::Nested(pipeline, fields) => lookup(&pipeline.run(dot, scope)?, fields).cloned(),
            Self::Word(word) if word.starts_with('.') => lookup(dot, word).cloned(),
            Self::Word(word) if word.starts_with('$') => {
                let (name, fields) = word.split_at(word.find('.').unwrap_or(word.len()));
                lookup(scope.get(name)?, fields).cloned()
            }
            Self::Word(word) => match literal(word) {
                Some(value) => Ok(value),
                None => scope.call(word, &[]),
            },
        }
    }
}

/// The variables that are set, the innermost last.
struct Scope<'a> {
    variables: Vec<(String, Value)>,
    functions: Functions<'a>,
    /// Taken so far.
    steps: usize,
}

impl Scope<'_> {
    fn call(&self, name: &str, arguments: &[Value]) -> anyhow::Result<Value> {
        match (self.functions)(name, arguments) {
            Some(result) => result.map_err(anyhow::Error::msg),
            None => call(name, arguments),
        }
    }

    fn get(&self, name: &str) -> anyhow::Result<&Value> {
        let found = self.variables.iter().rev().find(|(known, _)| known == name);
        found.map(|(_, value)| value).with_context(|| format!("there is no variable {name}: set it by {name} := …"))
    }
}

fn execute(nodes: &[Node], dot: &Value, scope: &mut Scope<'_>, out: &mut String) -> anyhow::Result<()> {
    let outer = scope.variables.len();
    for node in nodes {
        scope.steps += 1;
        ensure!(scope.steps <= STEPS_MAX && out.len() <= LEN_MAX, "it does not come to an end");
        match node {
            Node::Text(text) => *out += text,
            Node::Print(pipeline) => *out += &printed(&pipeline.run(dot, scope)?),
            Node::Set(name, pipeline) => {
                let value = pipeline.run(dot, scope)?;
                scope.variables.push((name.clone(), value));
            }
            Node::If(condition, yes, no) => {
                let chosen = if is_true(&condition.run(dot, scope)?) { yes } else { no };
                execute(chosen, dot, scope, out)?;
            }
            Node::With(pipeline, yes, no) => match pipeline.run(dot, scope)? {
                value if is_true(&value) => execute(yes, &value, scope, out)?,
                _ => execute(no, dot, scope, out)?,
            },
            Node::Range { names, over, each, none } => {
                let entries = entries(over.run(dot, scope)?)?;
                if entries.is_empty() {
                    execute(none, dot, scope, out)?;
                }
                for (key, value) in entries {
                    scope.steps += 1;
                    let before = scope.variables.len();
                    match names.as_slice() {
                        [] => {}
                        [name] => scope.variables.push((name.clone(), value.clone())),
                        [first, second, ..] => {
                            scope.variables.extend([(first.clone(), key), (second.clone(), value.clone())]);
                        }
                    }
                    execute(each, &value, scope, out)?;
                    scope.variables.truncate(before);
                }
            }
        }
    }
    scope.variables.truncate(outer);
    Ok(())
}

fn entries(value: Value) -> anyhow::Result<Vec<(Value, Value)>> {
    Ok(match value {
        Value::Null => Vec::new(),
        Value::Array(list) => list.into_iter().enumerate().map(|(index, value)| (json!(index), value)).collect(),
        Value::Object(map) => {
            // As Go has it, in the order of their keys.
            map.into_iter().collect::<BTreeMap<_, _>>().into_iter().map(|(key, value)| (json!(key), value)).collect()
        }
        other => bail!("range goes over lists and maps, and {other} is neither"),
    })
}

fn is_true(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

/// As Go prints it.
fn printed(value: &Value) -> String {
    match value {
        Value::Null => "<no value>".into(),
        Value::String(text) => text.clone(),
        Value::Array(list) => format!("[{}]", list.iter().map(printed).collect::<Vec<_>>().join(" ")),
        Value::Object(map) => {
            let sorted: BTreeMap<_, _> = map.iter().collect();
            let members = sorted.iter().map(|(key, value)| format!("{key}:{}", printed(value)));
            format!("map[{}]", members.collect::<Vec<_>>().join(" "))
        }
        other => other.to_string(),
    }
}

fn lookup<'a>(value: &'a Value, path: &str) -> anyhow::Result<&'a Value> {
    path.split('.').filter(|part| !part.is_empty()).try_fold(value, |value, part| {
        value.get(part).with_context(|| {
            let known: Vec<_> =
                value.as_object().map(|map| map.keys().map(String::as_str).collect()).unwrap_or_default();
            format!("there is no {path}: {part:?} is not among {}", known.join(", "))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value() -> Value {
        json!({
            "Name": "web", "Count": 3, "Spec": {"Labels": {"a": "1", "b": "2"}, "Empty": null},
            "Cmd": ["sleep", "1000"],
            "Networks": {"front": {"IPAddress": "10.0.0.2"}, "back": {"IPAddress": "10.0.1.2"}},
        })
    }

    #[test]
    fn templates_are_filled_as_go_fills_them() {
        for (template, want) in [
            ("{{.Name}}\t{{json .Spec.Labels}}", "web\t{\"a\":\"1\",\"b\":\"2\"}"),
            ("{{range .Networks}}{{.IPAddress}} {{end}}", "10.0.1.2 10.0.0.2 "),
            ("{{range $name, $net := .Networks}}{{$name}}={{$net.IPAddress}};{{end}}", "back=10.0.1.2;front=10.0.0.2;"),
            ("{{range $i, $word := .Cmd}}{{if $i}}, {{end}}{{$word}}{{end}}", "sleep, 1000"),
            ("{{range .Spec.Empty}}x{{else}}none{{end}}", "none"),
            ("{{.Cmd}} {{.Spec.Labels}} {{.Spec.Empty}}", "[sleep 1000] map[a:1 b:2] <no value>"),
            (r#"{{index .Spec.Labels "a"}}{{index .Spec.Labels "nope"}}{{index .Cmd 1}}"#, "11000"),
            (r#"{{(index .Networks "front").IPAddress}}"#, "10.0.0.2"),
            (r#"{{if and (eq .Name "web" "shop") (gt .Count 2)}}yes{{else}}no{{end}}"#, "yes"),
            (r#"{{if eq .Name "x"}}1{{else if eq .Count 3}}2{{else}}3{{end}}"#, "2"),
            ("{{with .Spec}}{{.Labels.a}}{{$.Name}}{{end}}", "1web"),
            ("{{$n := len .Cmd}}{{$n}}", "2"),
            (
                r#"{{.Cmd | json}} {{join .Cmd "+"}} {{upper .Name}} {{title "a b"}}"#,
                "[\"sleep\",\"1000\"] sleep+1000 WEB A B",
            ),
            (r#"{{printf "%-5s|%3d|%q" .Name .Count "x"}}{{print .Name 1}}"#, "web  |  3|\"x\"web 1"),
            ("a {{- .Name -}} b{{/* said */}}", "awebb"),
            (r#"{{slice .Name 1}}{{truncate .Name 2}}{{pad "x" 1 1}}{{not .Spec.Empty}}"#, "ebwe x true"),
            (r#"{{range split "a,b" ","}}<{{.}}>{{end}}"#, "<a><b>"),
        ] {
            assert_eq!(render(template, &value()).unwrap(), want, "{template}");
        }
    }

    #[test]
    fn mistakes_are_told() {
        for (template, why) in [
            ("{{.Nope}}", "Name"),
            ("{{range .Cmd}}", "{{end}}"),
            ("{{.Name", "}}"),
            ("{{end}}", "without a beginning"),
            ("{{nope .Name}}", "nope"),
            ("{{}}", "says nothing"),
            ("{{$x}}", "$x"),
            ("{{(.Name}}", ")"),
            ("{{index .Cmd 7}}", "beyond"),
            ("{{range .Name}}{{end}}", "neither"),
            ("{{.Name .Count}}", "function"),
        ] {
            let error = render(template, &value()).unwrap_err().to_string();
            assert!(error.contains(why) && error.contains("template"), "{template}: {error}");
        }
        for (endless, why) in [
            (r#"{{printf "%99999999s" .Name}}"#.to_owned(), "no width"),
            (r#"{{pad .Name 99999999 1}}"#.to_owned(), "padded"),
            (format!("{{{{$a := .Name}}}}{}", r#"{{$a := printf "%s%s" $a $a}}"#.repeat(40)), "longer"),
            ("{{range .Cmd}}".repeat(30) + &"{{end}}".repeat(30), "an end"),
        ] {
            let nested = endless.replace(".Cmd", "$.Cmd");
            assert!(render(&nested, &value()).unwrap_err().to_string().contains(why), "{endless}");
        }
        let deep = "{{if true}}".repeat(200) + &"{{end}}".repeat(200);
        assert!(render(&deep, &value()).is_err());
        let deep = format!("{{{{{}.Name{}}}}}", "(".repeat(200), ")".repeat(200));
        assert!(render(&deep, &value()).is_err());
    }
}

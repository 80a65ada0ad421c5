//! Tables: columns of aligned figures in sections, as many as fit, and a legend for those that are not plain.
//!
//! Nothing is ever wrapped: where the columns are wider than the terminal, those of least worth go, one after the other, and a
//! line says which. A column in which no row has a figure goes first. Crates for tables wrap or cut cells where there is too little room; what
//! is left of them without that is padding.

use crate::terminal::{Mark, Terminal};

/// Between two columns.
const GAP: usize = 2;

/// Before a row.
const INDENT: usize = 2;

/// Stands where a figure does not apply.
pub const NONE: &str = "–";

/// One column.
#[derive(Clone, Debug)]
pub struct Column {
    /// Its lines, the last one nearest to the figures.
    heading: &'static str,
    legend: String,
    worth: Option<u32>,
    best: Option<Best>,
    names: bool,
}

/// Which figures of a section are bold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Best {
    /// The greatest.
    Highest,
    /// The least.
    Lowest,
}

impl Column {
    /// A column of names, which always stays.
    pub fn names(heading: &'static str) -> Self {
        Self { heading, legend: String::new(), worth: None, best: None, names: true }
    }

    /// A column of figures, which always stays.
    pub fn figures(heading: &'static str) -> Self {
        Self { names: false, ..Self::names(heading) }
    }

    /// The same with a line that says what it is.
    pub fn legend(self, legend: impl Into<String>) -> Self {
        Self { legend: legend.into(), ..self }
    }

    /// The same, given up where there is too little room: columns of less worth before others.
    pub fn worth(self, worth: u32) -> Self {
        Self { worth: Some(worth), ..self }
    }

    /// The same with the best figures of each section in bold.
    pub fn best(self, best: Best) -> Self {
        Self { best: Some(best), ..self }
    }

    /// The heading in one line.
    fn name(&self) -> String {
        self.heading.replace('\n', " ")
    }
}

/// One entry of a row.
#[derive(Clone, Debug)]
pub struct Cell {
    text: String,
    value: Option<f64>,
    bad: bool,
}

impl Cell {
    /// A name.
    pub fn name(text: impl Into<String>) -> Self {
        Self { text: text.into(), value: None, bad: false }
    }

    /// A figure as it is written, and what it is compared by.
    pub fn figure(text: String, value: f64) -> Self {
        Self { text, value: Some(value), bad: false }
    }

    /// No figure.
    pub fn none() -> Self {
        Self::name(NONE)
    }

    /// The same, never the best.
    pub fn unranked(self) -> Self {
        Self { value: None, ..self }
    }

    /// The same as a loss, or not.
    pub fn bad(self, bad: bool) -> Self {
        Self { bad, ..self }
    }
}

/// Rows that belong together.
#[derive(Clone, Debug)]
struct Section {
    title: String,
    rows: Vec<Vec<Cell>>,
}

/// Columns and the rows under them.
#[derive(Clone, Debug)]
pub struct Table {
    columns: Vec<Column>,
    sections: Vec<Section>,
}

impl Table {
    /// A table without rows.
    pub fn new(columns: Vec<Column>) -> Self {
        Self { columns, sections: Vec::new() }
    }

    /// Begins a section; its title may be empty.
    pub fn section(&mut self, title: impl Into<String>) {
        self.sections.push(Section { title: title.into(), rows: Vec::new() });
    }

    /// Adds a row, an entry for each column.
    pub fn row(&mut self, cells: Vec<Cell>) {
        debug_assert_eq!(cells.len(), self.columns.len());
        if self.sections.is_empty() {
            self.section("");
        }
        if let Some(section) = self.sections.last_mut() {
            section.rows.push(cells);
        }
    }

    /// Sections with the columns that fit, then the legend of these; every line ends.
    pub fn text(&self, terminal: &Terminal) -> String {
        let (shown, left_out) = self.fitting(terminal.width);
        let mut text = String::new();
        for (index, section) in self.sections.iter().enumerate() {
            if index > 0 {
                text.push('\n');
            }
            if !section.title.is_empty() {
                text.push_str(&terminal.wrapped(&section.title, INDENT));
                text.push('\n');
            }
            self.headings(&shown, &mut text, terminal);
            for row in &section.rows {
                self.line(&shown, &mut text, |column, width| self.cell(section, row, column, width, terminal));
            }
        }
        self.legend(&shown, &left_out, &mut text, terminal);
        text
    }

    /// Columns that are shown, with their widths, and those that have something to show and no room.
    fn fitting(&self, width: usize) -> (Vec<(usize, usize)>, Vec<usize>) {
        let rows = || self.sections.iter().flat_map(|section| &section.rows);
        let width_of = |column: usize| {
            let cells = rows().map(|row| row[column].text.chars().count());
            let headings = self.columns[column].heading.lines().map(|line| line.chars().count());
            cells.chain(headings).max().unwrap_or(0)
        };
        let is_empty = |column: &usize| rows().all(|row| row[*column].text == NONE);
        let kept = |column: &usize| self.columns[*column].worth.is_none() || !is_empty(column);
        let mut shown: Vec<(usize, usize)> =
            (0..self.columns.len()).filter(kept).map(|column| (column, width_of(column))).collect();
        let mut left_out = Vec::new();
        let total = |shown: &[(usize, usize)]| INDENT + shown.iter().map(|(_, width)| width + GAP).sum::<usize>() - GAP;
        while total(&shown) > width {
            let worth =
                |&(at, (column, _)): &(usize, &(usize, usize))| self.columns[*column].worth.map(|worth| (worth, at));
            let Some((_, at)) = shown.iter().enumerate().filter_map(|entry| worth(&entry)).min() else { break };
            left_out.push(shown.remove(at).0);
        }
        left_out.sort_unstable();
        (shown, left_out)
    }

    fn headings(&self, shown: &[(usize, usize)], text: &mut String, terminal: &Terminal) {
        let lines = |column: usize| self.columns[column].heading.lines().count();
        let height = shown.iter().map(|&(column, _)| lines(column)).max().unwrap_or(0);
        for line in 0..height {
            self.line(shown, text, |column, width| {
                let above = height - lines(column);
                let word = line.checked_sub(above).and_then(|line| self.columns[column].heading.lines().nth(line));
                self.padded(column, word.unwrap_or_default(), width, |word| terminal.marked(Mark::Aside, word))
            });
        }
    }

    fn line(&self, shown: &[(usize, usize)], text: &mut String, cell: impl Fn(usize, usize) -> String) {
        let cells: Vec<String> = shown.iter().map(|&(column, width)| cell(column, width)).collect();
        let line = format!("{}{}", " ".repeat(INDENT), cells.join(&" ".repeat(GAP)));
        text.push_str(line.trim_end());
        text.push('\n');
    }

    fn cell(&self, section: &Section, row: &[Cell], column: usize, width: usize, terminal: &Terminal) -> String {
        let cell = &row[column];
        let mark = match cell.bad {
            true => Some(Mark::Bad),
            false => self.is_best(section, cell, column).then_some(Mark::Best),
        };
        self.padded(column, &cell.text, width, |text| mark.map_or(text.to_owned(), |mark| terminal.marked(mark, text)))
    }

    /// True for what is written as the best of its section is, where not all are.
    fn is_best(&self, section: &Section, cell: &Cell, column: usize) -> bool {
        let Some(best) = self.columns[column].best else { return false };
        let figures = || section.rows.iter().map(|row| &row[column]).filter(|cell| cell.value.is_some());
        let by_value = |a: &&Cell, b: &&Cell| a.value.unwrap_or(0.0).total_cmp(&b.value.unwrap_or(0.0));
        let found = match best {
            Best::Highest => figures().max_by(by_value),
            Best::Lowest => figures().min_by(by_value),
        };
        found.is_some_and(|best| best.text == cell.text) && figures().any(|other| other.text != cell.text)
    }

    /// `text` as wide as its column: names to the left, figures to the right. Marks have no width.
    fn padded(&self, column: usize, text: &str, width: usize, marked: impl Fn(&str) -> String) -> String {
        let space = " ".repeat(width.saturating_sub(text.chars().count()));
        let text = if text.is_empty() { String::new() } else { marked(text) };
        match self.columns[column].names {
            true => text + &space,
            false => space + &text,
        }
    }

    fn legend(&self, shown: &[(usize, usize)], left_out: &[usize], text: &mut String, terminal: &Terminal) {
        let explained =
            || shown.iter().map(|&(column, _)| &self.columns[column]).filter(|column| !column.legend.is_empty());
        let width = explained().map(|column| column.name().chars().count()).max().unwrap_or(0);
        let mut lines: Vec<String> = Vec::new();
        for column in explained() {
            let line = format!("{}{:<width$}{}{}", " ".repeat(INDENT), column.name(), " ".repeat(GAP), column.legend);
            lines.push(terminal.wrapped(&line, INDENT + width + GAP));
        }
        if !left_out.is_empty() {
            let names: Vec<String> = left_out.iter().map(|&column| self.columns[column].name()).collect();
            let line = format!("  no room in {} columns for {}", terminal.width, names.join(", "));
            lines.push(terminal.wrapped(&line, INDENT));
        }
        if !lines.is_empty() {
            text.push('\n');
        }
        for line in lines.iter().flat_map(|line| line.lines()) {
            text.push_str(&terminal.marked(Mark::Aside, line));
            text.push('\n');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new(vec![
            Column::names("router"),
            Column::figures("survival").legend("slots that were kept").best(Best::Highest),
            Column::figures("max\nload").legend("of the fullest expert").worth(2).best(Best::Lowest),
            Column::figures("tok/s").worth(1),
            Column::figures("of bound").worth(9),
        ]);
        let row = |name: &str, survival: f64, load: f64, rate: f64| {
            vec![
                Cell::name(name),
                Cell::figure(format!("{:.2} %", 100.0 * survival), survival).bad(survival < 1.0),
                Cell::figure(format!("{load:.2} ×"), load),
                Cell::figure(format!("{rate:.0}"), rate),
                Cell::none(),
            ]
        };
        table.section("no limit");
        table.row(row("top-k", 1.0, 2.5, 1234.0));
        table.row(row("phase", 0.5, 1.0, 99.0));
        table
    }

    #[test]
    fn figures_stand_below_each_other_and_the_legend_below_them() {
        let expected = "\
no limit
                       max
  router  survival    load  tok/s
  top-k   100.00 %  2.50 ×   1234
  phase    50.00 %  1.00 ×     99

  survival  slots that were kept
  max load  of the fullest expert
";
        assert_eq!(table().text(&Terminal::plain(80)), expected);
    }

    #[test]
    fn columns_of_least_worth_go_first_and_leave_the_legend() {
        let narrow = table().text(&Terminal::plain(32));
        assert!(
            narrow.contains("2.50 ×\n")
                && !narrow.contains("load  tok/s")
                && narrow.ends_with("no room in 32 columns for\n  tok/s\n"),
            "{narrow}"
        );
        let narrower = table().text(&Terminal::plain(20));
        assert!(!narrower.contains("of the fullest expert") && narrower.contains("100.00 %"), "{narrower}");
        assert!(narrower.replace("\n ", "").contains("columns for max load, tok/s"), "{narrower}");
        for (width, text) in [(32, narrow), (20, narrower)] {
            assert!(text.lines().all(|line| line.chars().count() <= width), "{text}");
        }
    }

    #[test]
    fn the_best_are_bold_losses_red_and_nothing_else_moves() {
        let coloured = table().text(&Terminal::plain(80).in_colour());
        assert!(
            coloured.contains("\u{1b}[1m100.00 %\u{1b}[0m") && coloured.contains("\u{1b}[31m50.00 %\u{1b}[0m"),
            "{coloured}"
        );
        assert!(coloured.contains("\u{1b}[1m1.00 ×") && !coloured.contains("\u{1b}[1m2.50 ×"), "{coloured}");
        assert_eq!(console::strip_ansi_codes(&coloured), table().text(&Terminal::plain(80)));
    }

    #[test]
    fn where_all_are_equal_none_is_best() {
        let mut table = Table::new(vec![Column::names("router"), Column::figures("mass").best(Best::Highest)]);
        for name in ["a", "b"] {
            table.row(vec![Cell::name(name), Cell::figure("1.00".into(), 1.0)]);
        }
        assert!(!table.text(&Terminal::plain(80).in_colour()).contains("\u{1b}[1m"));
    }
}

-- What Quarto adds to pandoc, as far as these pages use it: numbers for equations, figures and
-- tables, references to them, and callouts.
local NAMES = {eq = "Equation", fig = "Figure", tbl = "Table"}
local numbers, counts, cites_literature = {}, {eq = 0, fig = 0, tbl = 0}, false

local function kind(id) return id:match("^(%a+)%-") end

local function number(id)
  counts[kind(id)] = counts[kind(id)] + 1
  numbers[id] = counts[kind(id)]
  return numbers[id]
end

-- `$$ x $$ {#eq-name}`: the number stands beside its equation.
local function equations(inlines)
  local made = pandoc.Inlines{}
  for _, item in ipairs(inlines) do
    local label, rest = pandoc.utils.stringify(item):match("^{#(eq%-[%w-]+)}(.*)$")
    local equation = made:at(-2) -- then comes a space
    if item.mathtype == "DisplayMath" then
      made:insert(pandoc.Span({item}, {class = "equation"}))
    elseif label and equation and equation.t == "Span" then
      made:remove()
      equation.identifier = label
      equation.content:insert(pandoc.Span("(" .. number(label) .. ")", {class = "number"}))
      made:insert(pandoc.Str(rest))
    else
      made:insert(item)
    end
  end
  return made
end

-- A label of a figure or a table puts its number before the caption.
local function captioned(block)
  local name = NAMES[kind(block.identifier)]
  if not name then return end
  block.caption.long[1].content:insert(1, name .. " " .. number(block.identifier) .. ": ")
  return block
end

-- `::: {.callout-tip title="…" collapse="true"}`: a box, or a fold.
local function callout(div, kind)
  local name = div.attributes.title or kind:gsub("^%l", string.upper)
  local title, fold = pandoc.read(name).blocks[1].content, div.attributes.collapse
  local outer, inner = fold and "details" or "div", fold and "summary" or "p"
  local open = ('<%s class="callout %s"%s><%s>'):format(
    outer, kind, fold == "false" and " open" or "", inner)
  title:insert(1, pandoc.RawInline("html", open))
  title:insert(pandoc.RawInline("html", "</" .. inner .. ">"))
  div.content:insert(1, pandoc.Plain(title))
  div.content:insert(pandoc.RawBlock("html", "</" .. outer .. ">"))
  return div.content
end

-- A callout, or a figure whose last paragraph is its caption.
local function divs(div)
  local callout_kind = div.classes:at(1, ""):match("^callout%-(%a+)")
  if callout_kind then return callout(div, callout_kind) end
  if not div.classes:includes("figure") then return end
  local caption = div.content:remove()
  return captioned(pandoc.Figure(div.content, {caption}, div.attr))
end

local function reference(cite)
  local id = cite.citations[1].id
  if not numbers[id] or #cite.citations > 1 then
    cites_literature = true
    return
  end
  return pandoc.Link(NAMES[kind(id)] .. "\u{a0}" .. numbers[id], "#" .. id)
end

-- pandoc would give the list of literature a title of the first level.
local function literature(doc)
  if not cites_literature then return end
  doc.blocks:insert(pandoc.Header(2, "References", {id = "references"}))
  return doc
end

return {{Inlines = equations, Div = divs, Figure = captioned, Table = captioned},
        {Cite = reference, Pandoc = literature}}

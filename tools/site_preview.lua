-- What the site's Markdown needs beyond pandoc: `\tag{3}` in an equation puts its number beside it.
-- MathJax, which JupyterLab, Colab and Quarto show equations with, knows the command; MathML does not.
local function tagged(math)
  if math.mathtype ~= "DisplayMath" then return end
  local number
  math.text = math.text:gsub("%s*\\tag{(%d+)}", function(n) number = n return "" end)
  local parts = {math}
  if number then table.insert(parts, pandoc.Span("(" .. number .. ")", {class = "number"})) end
  return pandoc.Span(parts, {class = "equation"})
end

return {{Math = tagged}}

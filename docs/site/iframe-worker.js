// Browsers start no workers in pages that are opened from the disk, and the search of this site is one. There it runs in a hidden frame.
// MkDocs Material would load such a script from another host; its plugin "offline" takes this one instead (extra.polyfills in mkdocs.yml).
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.frame.srcdoc =
        `<script>postMessage = data => frameElement.dispatchEvent(new CustomEvent("answer", {detail: data}))</script><script src="${url}"></script>`
      this.frame.addEventListener("answer", event => this.dispatchEvent(new MessageEvent("message", {data: event.detail})))
      this.frame.addEventListener("load", () => {
        const questions = this.waiting
        this.waiting = null
        questions.forEach(data => this.postMessage(data))
      })
      document.body.appendChild(this.frame)
    }
    postMessage(data) {
      if (this.waiting) this.waiting.push(data)
      else this.frame.contentWindow.dispatchEvent(new MessageEvent("message", {data}))
    }
  }
}
